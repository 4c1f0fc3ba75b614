"""Files that others wrote or that a disk damaged: checkpoints, exports, tokenizers, data."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fuzzing.forgery import forge_manifest, forge_metadata
from fuzzing.mutations import damaged, edited, retyped
from torchtitan_mtp.checkpoint import Checkpointer, load_model_weights
from torchtitan_mtp.config import Checkpoint, JobConfig, to_toml
from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.data.tokenizer import ByteTokenizer, build_tokenizer
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.inference.load import load_for_inference
from torchtitan_mtp.models.flavors import model_args
from torchtitan_mtp.models.init import init_weights
from torchtitan_mtp.models.transformer import Transformer, build_model
from torchtitan_mtp.mtp import add_heads

TEXT = {".toml", ".json", ".jsonl", ".txt", ".model"}
WORDS = ["alpha beta", "gamma", "delta epsilon zeta", "eta"]


class WrongWeights(Exception):
    """A damaged checkpoint was loaded, and is not what was saved."""


class PartialOutput(Exception):
    """A failed command left something behind."""


class Files:
    """Whole files of every kind, made once; a case damages one file of a copy and reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.readers: dict[str, Callable[[Path], None]] = {}
        self._make_checkpoints()
        self._make_exports()
        self._make_tokenizers()
        self._make_data()

    def case(self, rng: random.Random, folder: Path) -> None:
        """Raises UserError where the damage is noticed."""
        # The one reader that unpickles gets more than its share.
        name = rng.choice([*sorted(self.readers), *["run", "unverified"] * 4])
        place = folder / "files"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.folder / name, place)
        files = sorted(file for file in place.rglob("*") if file.is_file())
        file = rng.choice(files)
        content = file.read_bytes()
        text = file.suffix in TEXT
        if file.name == ".metadata" and rng.random() < 0.5:
            forge_metadata(file, rng)
        elif file.name == "manifest.json" and rng.random() < 0.5:
            forge_manifest(file, rng)
        elif file.suffix == ".json" and rng.random() < 0.5:
            file.write_bytes(retyped(content, rng))
        elif text and rng.random() < 0.6:
            file.write_bytes(edited(content, rng))
        elif rng.random() < 0.03:
            file.unlink()
        else:
            file.write_bytes(damaged(content, rng, rng.choice(files).read_bytes()))
        before = set(folder.iterdir())
        try:
            self.readers[name](place)
        except Exception:
            if left := [entry.name for entry in folder.iterdir() if entry not in before]:
                raise PartialOutput(f"{name} left {left}") from None
            raise

    # ---- checkpoints ----

    def _model(
        self, seed: int = 0, heads: str = "parallel", mimo: bool = False
    ) -> tuple[Transformer, JobConfig]:
        config = JobConfig()
        config.model.flavor, config.model.vocab_size = "custom", 320
        args = config.model.args
        args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.hidden_dim = 16, 2, 2, 1, 24
        config.model.converters, config.mtp.num_future_tokens = ["mtp"], 2
        config.mtp.heads = heads  # type: ignore[assignment]
        if mimo:
            args.qkv_bias, config.mtp.trunk_state = True, "raw"
        config.training.seq_len = 16
        model = build_model(
            model_args(
                "llama3",
                "custom",
                tokenizer_vocab=259,
                vocab_size=320,
                max_seq_len=16,
                changes=args.given(),
            )
        )
        add_heads(model, config.mtp)
        model.to_empty(device="cpu")
        init_weights(model, seed)
        return model, config

    def _checkpointer(self, folder: Path, model: Transformer) -> Checkpointer:
        settings = replace(Checkpoint(), enable=True, last_save_model_only=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return Checkpointer(settings, folder, model, optimizer, {"lr_scheduler": schedule})

    def _make_checkpoints(self) -> None:
        run = self.folder / "run"
        model, config = self._model()
        checkpointer = self._checkpointer(run, model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        assert checkpointer.optimizer is not None
        checkpointer.optimizer.step()
        checkpointer.save(5, force=True)
        (run / "config.toml").write_text(to_toml(config))
        shutil.copytree(run, self.folder / "unverified")
        (self.folder / "unverified" / "checkpoint" / "step-5" / "manifest.json").unlink()
        self._saved = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.readers |= {"run": self._resume, "unverified": self._load_unverified}
        for name, reader in (("exported run", self._export), ("generating run", self._generate)):
            shutil.copytree(run, self.folder / name)
            self.readers[name] = reader

    def _resume(self, place: Path) -> None:
        model, _ = self._model(seed=1)
        if self._checkpointer(place, model).load() is None:
            return  # what is not there any more is nothing to resume from
        for name, parameter in model.named_parameters():
            if not torch.equal(parameter, self._saved[name]):
                raise WrongWeights(name)

    def _load_unverified(self, place: Path) -> None:
        load_model_weights(place / "checkpoint", self._model(seed=1)[0])

    def _generate(self, place: Path) -> None:
        load_for_inference(place)

    def _export(self, place: Path) -> None:
        out = place.parent / "out"
        export_checkpoint(place, out, "meta", drop_heads=True)
        shutil.rmtree(out)

    # ---- exports ----

    def _make_exports(self) -> None:
        source = self.folder / "run"
        for name, form in (("llama", "llama_hf"), ("meta", "meta")):
            export_checkpoint(
                source, self.folder / name, form, drop_heads=True, max_shard_size=20_000
            )
            self.readers[name] = self._importer(form)
        for name, form in (("glm", "glm4_moe_hf"), ("mimo", "mimo_hf")):
            model, config = self._model(heads="sequential", mimo=name == "mimo")
            chain = self.folder.parent / f"chain {name}"
            checkpointer = self._checkpointer(chain, model)
            checkpointer.save(5, force=True)
            (chain / "config.toml").write_text(to_toml(config))
            export_checkpoint(chain, self.folder / name, form)
            self.readers[name] = self._importer(form)

    def _importer(self, form: str) -> Callable[[Path], None]:
        def read(place: Path) -> None:
            out = place.parent / "out"
            import_checkpoint(place, out, form)
            shutil.rmtree(out)

        return read

    # ---- tokenizers and data ----

    def _make_tokenizers(self) -> None:
        import tokenizers

        hub = self.folder / "tokenizer"
        hub.mkdir()
        vocab = {bytes([i]).decode("latin-1"): i for i in range(256)} | {"<s>": 256, "</s>": 257}
        model = tokenizers.models.BPE(vocab, [], unk_token="<s>")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.save(str(hub / "tokenizer.json"))
        settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
        (hub / "tokenizer_config.json").write_text(json.dumps(settings))
        import base64

        ranks = self.folder / "ranks"
        ranks.mkdir()
        lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
        (ranks / "tokenizer.model").write_text("".join(lines))
        self.readers |= {"tokenizer": self._tokenize, "ranks": self._tokenize}

    def _tokenize(self, place: Path) -> None:
        tokenizer = build_tokenizer(str(place))
        tokenizer.decode(tokenizer.encode("alpha\u00e9 \ud800").tolist())

    def _make_data(self) -> None:
        import pyarrow
        import pyarrow.parquet
        import zstandard

        texts = [f"{word} {i} " * (1 + i % 5) for i in range(30) for word in WORDS]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        pairs = [{"prompt": text, "completion": "yes"} for text in texts]
        contents = {
            "a.jsonl": lines,
            "b.jsonl.gz": gzip.compress(lines),
            "c.jsonl.zst": zstandard.compress(lines),
            "d.txt": " ".join(texts).encode(),
            "e.txt.gz": gzip.compress(" ".join(texts).encode()),
            "f.jsonl": "".join(json.dumps(pair) + "\n" for pair in pairs).encode(),
        }
        for name, content in contents.items():
            (self.folder / f"data {name}").mkdir()
            (self.folder / f"data {name}" / name).write_bytes(content)
            self.readers[f"data {name}"] = self._read_data
        (self.folder / "data parquet").mkdir()
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(
            table, self.folder / "data parquet" / "g.parquet", row_group_size=20
        )
        self.readers["data parquet"] = self._read_data

    def _read_data(self, place: Path) -> None:
        source = build_source("fuzzed", str(place))
        loader = DataLoader(source, ByteTokenizer(), 32, 2, 2, split="all", prefetch=0)
        for _ in range(4):
            make_batch(loader.next_window(), 2)
        for i, window in enumerate(
            DataLoader(source, ByteTokenizer(), 32, 2, 2, split="all", infinite=False)
        ):
            make_batch(window, 2)
            if i == 20:
                break
