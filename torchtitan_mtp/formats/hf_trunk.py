"""Weights of a trunk that is transformers' own, from its folder and back.

Names on disk and in memory differ for some models (a mixture's experts lie one by one and are held
stacked): transformers knows how, and is asked for one parameter after another, so that no more than
one is ever whole. It knows nothing of modules: their blocks are shown to it as the layer of the
trunk that they copy.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan_mtp.checkpoint.load import names_line
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.names import swap_halves
from torchtitan_mtp.formats.native_modules import COPIES, Contract, architecture_of, contract_of
from torchtitan_mtp.formats.read import Kind, difference, hf_tensors
from torchtitan_mtp.formats.write import DTYPES
from torchtitan_mtp.models.hf import HFTrunk

_LEFT_OUT = (r"^(model\.)?mtp\.", r"^model\.mtp_layers\.", r"rotary_emb\.inv_freq$")


class TrunkFolder:
    """A folder of transformers, read for a model of that kind.

    contract: of modules in it, where these are wanted. tensors: by their names on disk; places:
    those names by ours, which are the model's own words for parts of its parameters. rest: the
    names that are no part of the model. copies: names of what repeats a parameter, and of which.

    Raises:
        UserError: no weights, a damaged file, or modules that are not as the contract says.
    """

    def __init__(self, path: Path, model: HFTrunk, contract: Contract | None = None) -> None:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model, self.causal, self.tensors = model, model.causal, hf_tensors(path)
        self._loading, self._contract = loading, contract
        mapping = get_model_conversion_mapping(self.causal)
        self._renamings = [e for e in mapping if isinstance(e, loading.WeightRenaming)]
        self._converters = [e for e in mapping if isinstance(e, loading.WeightConverter)]
        self._trunk, self.state = self.causal.state_dict(), model.state_dict()
        self._tied = f"{model.output_name}.weight" if model.args.tied_embeddings else None
        self.places: dict[str, str] = {}
        self.rest: list[str] = []
        self.copies: dict[str, str] = {}
        # By parameter, the parts that it is made of, each with a converter's pattern.
        self._parts: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted(self.tensors.kinds, key=loading.dot_natural_key):
            self._add(name)
        self.modules = {name.split(".")[2] for name in self.places if name.startswith("mtp.")}
        self._check_modules()

    def place(self, name: str) -> tuple[int, str] | None:
        """As `Contract.place`; None without a contract."""
        contract, layers = self._contract, self.model.args.n_layers
        return None if contract is None else contract.place(name, layers)

    def parameter(self, part: str) -> str:
        """The name of the weight of `tok_embeddings` or `output`; of tied ones the former's."""
        weight = getattr(self.model, part).weight
        return next(name for name, param in self.causal.named_parameters() if param is weight)

    def _shown(self, ours: str) -> tuple[str, str, str]:
        """A name as transformers is shown it; how that begins, and ours, if it is of a block."""
        match = re.match(r"mtp\.heads\.\d+\.block\.", ours)
        if match is None:
            return ours, "", ""
        layer = f"{self.model.layers_name}.{self.model.head_layer}."
        return layer + ours[match.end() :], layer, match[0]

    def _add(self, name: str) -> None:
        ours, place, loading = name, self.place(name), self._loading
        if place is not None:
            if place[0] >= self.model.spec.num_modules:
                self.rest.append(name)
                return
            if place[1] in COPIES:
                self.copies[name] = self.parameter(COPIES[place[1]])
                return
            ours = f"mtp.heads.{place[0]}.{place[1]}"
        (shown, layer, head), base = self._shown(ours), self.causal.base_model_prefix
        lists = (self._renamings, self._converters)
        made, pattern = loading.rename_source_key(shown, *lists, base, self._trunk)
        part = loading.apply_renamings(shown, self._renamings)
        if made not in self._trunk:
            made, pattern = shown, None
        parameter = head + made.removeprefix(layer)
        if parameter not in self.state and place is None:
            self.rest.append(name)
            return
        where, dtype = f"{self.tensors.where}: {name} is", self.tensors.kinds[name].dtype
        if parameter not in self.state:
            raise UserError(f"{where} no part of a module of {architecture_of(self.model.spec)}")
        if dtype not in DTYPES and self.state[parameter].is_floating_point():
            raise UserError(f"{where} of {dtype}, quantised; take the folder before that")
        if made.startswith(f"{base}.") and not part.startswith(f"{base}."):
            part = f"{base}.{part}"
        if parameter == self._tied:
            self.copies[name] = self.parameter("output")
            return
        ours = parameter if pattern is None else head + part.removeprefix(layer)
        self.places[ours] = name
        self._parts.setdefault(parameter, []).append((ours, pattern))

    def _check_modules(self) -> None:
        where = self.tensors.where
        for name in self.state.keys() - self._parts.keys():
            if name.startswith("mtp.") and name.split(".")[2] in self.modules:
                raise UserError(f"{where}: lacks {self.on_disk(name)}; download it again")
        config, at = self.causal.config, self.model.head_layer
        for key in self._contract.kinds if self._contract and self.modules else ():
            told = getattr(config, f"mtp_{key}", None) or []
            if told and told[0] != getattr(config, key)[at]:
                why = f"config.json: mtp_{key} = {told}, and the trunk has no such layer to copy"
                raise UserError(f"{where}: {why}; exclude mtp from loading")
        for name, of in self.copies.items():
            if (theirs := self.on_disk(of)) not in self.tensors.kinds:
                raise UserError(f"{where}: holds {name}, which repeats {theirs}, and not that")
            if far := difference(self.tensors.read(name), self.tensors.read(theirs)):
                what = f"{name} differs from {theirs} by up to {far:.3g}"
                todo = "modules share the trunk's: take it out"
                if self.place(name) is None:
                    todo = "config.json ties them: say tie_word_embeddings = false there"
                raise UserError(f"{where}: {what}; {todo}")

    def on_disk(self, ours: str) -> str:
        """Where a part lies, or is to lie by the contract."""
        if ours in self.places or self._contract is None or not ours.startswith("mtp."):
            return self.places.get(ours, ours)
        _, _, k, part = ours.split(".", 3)
        return self._contract.name(int(k), part, self.model.args.n_layers)

    def kind(self, ours: str, tensor: Tensor) -> Kind:
        """Shape and dtype on disk of a part; a new block's are of the dtypes of the layer that it
        copies, what else is new of the embedding's."""
        names = (ours, self._shown(ours)[0], self.parameter("tok_embeddings"))
        place = next(self.places[name] for name in names if name in self.places)
        return Kind(tensor.shape, self.tensors.kinds[place].dtype)

    def ignored(self, name: str) -> bool:
        """Whether a name on disk is one that transformers leaves out, too: of modules that predict
        further tokens, and tables that follow from the config."""
        known, contract = self.causal._keys_to_ignore_on_load_unexpected or (), self._contract
        contract = contract or contract_of(self.model.spec)
        if contract is not None and contract.place(name, self.model.args.n_layers):
            return True
        return any(re.search(p, name) for p in (*known, *_LEFT_OUT))

    # ------------------------------------------------------------- tensors

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters by the model's names, each whole, one after another."""
        for parameter, parts in self._parts.items():
            yield from self._converted(self._converters, parameter, parts, self._read).items()

    def shape(self, name: str) -> Tensor:
        """A whole parameter without its memory."""
        return torch.empty(self.state[name].shape, device="meta")

    def _read(self, ours: str) -> Tensor:
        return self.tensors.read(self.places[ours])

    def check_parts(self, parameter: str) -> None:
        """Error: the folder lacks some of the tensors that a parameter is made of (an expert)."""
        lost: list[str] = []
        with contextlib.suppress(UserError):
            for part, back in self.written().items():
                made_of_it = parameter in (name for name, _ in back.args[2])
                lost += [self.on_disk(part)] if made_of_it and part not in self.places else []
        if lost:
            raise UserError(f"{self.tensors.where}: lacks {names_line(lost)}; download it again")

    def written(self) -> dict[str, functools.partial[dict[str, Tensor]]]:
        """How to undo `read`: of each part the function that, given how parameters are read, makes
        it, and all that are made with it."""
        turned: list[Any] = [how.reverse_transform() for how in reversed(self._converters)]
        groups: dict[str, list[tuple[str, str | None]]] = {}
        for name in self.state:
            first, pattern = name, None
            if name not in self.places:
                shown, layer, head = self._shown(name)
                first, pattern = self._loading.apply_converters(shown, turned)
                first = head + first.removeprefix(layer)
            if first in self.places or pattern or name.startswith("mtp."):  # else it is tied
                groups.setdefault(first, []).append((name, pattern))
        found: dict[str, Any] = {}
        for first, parts in groups.items():
            back = functools.partial(self._converted, turned, first, parts)
            found |= dict.fromkeys(back(self.shape), back)
        return found

    def _converted(
        self,
        converters: list[Any],
        first: str,
        parts: list[tuple[str, str | None]],
        read: Callable[[str], Tensor],
    ) -> dict[str, Tensor]:
        """What transformers makes of tensors, by our names; its name for them is `first`."""
        name, pattern = parts[0]
        if pattern is None:
            swapped = self._contract is not None and self._contract.hidden_first
            swapped = swapped and name.endswith(".eh_proj.weight")
            return {first: swap_halves(read(name)) if swapped else read(name)}
        shown, layer, head = self._shown(first)
        how = copy.deepcopy({p: how for how in converters for p in how.source_patterns}[pattern])
        for name, pattern in parts:
            how.add_tensor(shown, self._shown(name)[0], pattern, read(name))
        try:
            made = how.convert(shown, model=self.causal, config=self.causal.config)
        except (ValueError, RuntimeError, KeyError) as error:
            if converters is self._converters:
                self.check_parts(first)
            names = ", ".join(self.on_disk(name) for name, _ in parts[:2])
            reason = str(error).partition("\n")[0]
            what = f"{first} can't be made of {names} ...: {reason}"
            raise UserError(f"{self.tensors.where}: {what}; download it again") from error
        one = {n: value[0] if isinstance(value, list) else value for n, value in made.items()}
        return {head + n.removeprefix(layer): value for n, value in one.items()}
