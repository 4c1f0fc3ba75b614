"""Weights of a trunk that is transformers' own, from its folder.

Names on disk and in memory differ for some models (a mixture's experts lie one by one and are held
stacked): transformers knows how, and is asked for one parameter after another, so that no more than
one is ever whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.read import hf_tensors
from torchtitan_mtp.models.hf import HFTrunk

_LEFT_OUT = (r"^(model\.)?mtp\.", r"rotary_emb\.inv_freq$")


class TrunkFolder:
    """A folder of transformers, read for a model of that kind.

    tensors: by their names on disk. rest: the names that are no part of the trunk.

    Raises:
        UserError: no weights, or a damaged file.
    """

    def __init__(self, path: Path, model: HFTrunk) -> None:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.causal, self.tensors = model.causal, hf_tensors(path)
        mapping = get_model_conversion_mapping(self.causal)
        renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        by_pattern = {p: entry for entry in converters for p in entry.source_patterns}
        base, ours = self.causal.base_model_prefix, self.causal.state_dict()
        self.rest: list[str] = []
        # By the first parameter that it makes: what makes it, of which names and their patterns.
        self._groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        for name in sorted(self.tensors.kinds, key=loading.dot_natural_key):
            renamed, pattern = loading.rename_source_key(name, renamings, converters, base, ours)
            if renamed not in ours and name in ours:
                renamed, pattern = name, None
            if renamed not in ours:
                self.rest.append(name)
                continue
            if pattern is None:
                how: Any = loading.WeightRenaming(name, renamed)
            else:
                how = copy.deepcopy(by_pattern[pattern])
            self._groups.setdefault(renamed, (how, []))[1].append((name, pattern or name))

    def ignored(self, name: str) -> bool:
        """Whether a name on disk is one that transformers leaves out, too: of modules that predict
        further tokens, and tables that follow from the config."""
        known = self.causal._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, name) for pattern in (*known, *_LEFT_OUT))

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters by the model's names, each whole, one after another."""
        for first, (how, sources) in self._groups.items():
            how = copy.deepcopy(how)
            for name, pattern in sources:
                how.add_tensor(first, name, pattern, self.tensors.read(name))
            try:
                made = how.convert(first, model=self.causal, config=self.causal.config)
            except (ValueError, RuntimeError, KeyError) as error:
                names = ", ".join(name for name, _ in sources[:2])
                reason = str(error).partition("\n")[0]
                what = f"{first} can't be made of {names} ...: {reason}"
                raise UserError(f"{self.tensors.where}: {what}; download it again") from error
            for name, value in made.items():
                yield name, value[0] if isinstance(value, list) else value
