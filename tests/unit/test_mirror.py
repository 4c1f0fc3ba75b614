"""Every file of the package has its test: of the same name in the same place, or one named here."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE, TESTS = ROOT / "torchtitan_mtp", ROOT / "tests"

# What one test shows of several files, or only a whole run can.
WHOSE = {
    "checkpoint/load": "unit/checkpoint/test_load_weights",
    "checkpoint/manifest": "unit/checkpoint/test_checkpointer",
    "checkpoint/metadata": "unit/checkpoint/test_damage",
    "checkpoint/origin": "integration/test_moved_folders",
    "checkpoint/resume": "integration/test_resume",
    "checkpoint/state": "integration/test_resume",
    "checkpoint/storage": "unit/checkpoint/test_checksums",
    "cli/answers": "integration/test_answers",
    "cli/arguments": "integration/test_generate",
    "cli/converse": "integration/test_generate",
    "cli/evaluate": "integration/test_evaluate",
    "cli/export_checkpoint": "integration/test_export",
    "cli/figures": "integration/test_evaluate",
    "cli/generate": "integration/test_generate",
    "cli/import_checkpoint": "integration/test_export",
    "cli/prompts": "integration/test_generate",
    "cli/tasks": "integration/test_evaluate",
    "cli/train_tokenizer": "unit/data/test_train_tokenizer",
    "config/checks": "unit/config/test_config_checks",
    "config/job_config": "unit/config/test_toml_reading",
    "config/manager": "unit/config/test_command_line",
    "config/names": "unit/config/test_toml_reading",
    "config/sections/checkpoint": "unit/config/test_config_checks",
    "config/sections/model": "unit/config/test_config_checks",
    "config/sections/mtp": "unit/config/test_config_checks",
    "config/sections/parallelism": "unit/config/test_config_checks",
    "config/sections/quantize": "unit/config/test_config_checks",
    "config/sections/run": "unit/config/test_config_checks",
    "config/sections/training": "unit/config/test_config_checks",
    "config/setting": "unit/config/test_config_checks",
    "config/toml_file": "unit/config/test_toml_reading",
    "config/torchtitan": "unit/config/test_train_configs",
    "config/values": "unit/config/test_config_fuzz",
    "data/compressed": "unit/data/test_sources",
    "data/corpus": "unit/data/test_coverage",
    "data/document": "unit/data/test_sources",
    "data/files": "unit/data/test_sources",
    "data/folders": "unit/data/test_data_folders",
    "data/lanes": "unit/data/test_coverage",
    "data/loader": "unit/data/test_endless_loader",
    "data/order": "unit/data/test_endless_loader",
    "data/parquet": "unit/data/test_sources",
    "data/run": "unit/data/test_run_data",
    "data/spans": "unit/data/test_sources",
    "distributed/memory": "unit/distributed/test_memory_bounds",
    "distributed/parallelize": "distributed/test_gradients",
    "distributed/pipeline": "distributed/test_pipeline_ranks",
    "distributed/ranks": "distributed/test_spawn",
    "distributed/stopping": "unit/distributed/test_signals",
    "errors": "faults/test_errors",
    "formats/configs": "unit/formats/test_formats",
    "formats/deepseek_v3": "unit/formats/test_deepseek_v3_format",
    "formats/exporting": "unit/formats/test_formats",
    "formats/fp8": "unit/formats/test_deepseek_v3_format",
    "formats/hf_trunk": "unit/formats/test_native_modules",
    "formats/names": "unit/formats/test_formats",
    "formats/read": "unit/formats/test_formats",
    "formats/same": "integration/test_same_export",
    "formats/tokenizer_files": "unit/data/test_special_tokens",
    "formats/training": "unit/formats/test_formats",
    "formats/write": "unit/formats/test_formats",
    "inference/drafting": "unit/inference/test_decoding",
    "inference/rows": "unit/inference/test_decoding",
    "models/expert_parallel": "distributed/test_expert_ranks",
    "models/args": "unit/models/test_flavors",
    "models/heads": "unit/mtp/test_transform",
    "models/hf_config": "unit/models/test_hf",
    "models/hf_spans": "unit/inference/test_hf_decoding",
    "models/init": "unit/models/test_transformer",
    "models/layers": "unit/models/test_transformer",
    "models/rope": "unit/models/test_attention",
    "models/taps": "unit/models/test_hf",
    "models/trunk": "unit/models/test_transformer",
    "monitoring/backends": "unit/monitoring/test_metrics",
    "monitoring/losses": "unit/monitoring/test_metrics",
    "monitoring/progress": "unit/monitoring/test_logging",
    "mtp/parallel": "unit/mtp/test_engine",
    "mtp/schedule": "unit/mtp/test_engine",
    "mtp/sequential": "unit/mtp/test_engine",
    "nonfinite": "faults/test_nonfinite",
    "ops/autograd": "unit/ops/test_linear_cross_entropy",
    "ops/chunked": "unit/ops/test_linear_cross_entropy",
    "ops/soft_targets": "unit/ops/test_distilled",
    "ops/token_losses": "unit/ops/test_linear_cross_entropy",
    "ops/vocabulary": "distributed/test_vocabulary_ranks",
    "train": "integration/test_bad_input",
    "transfer": "integration/test_no_waiting",
    "validation": "integration/test_validation",
}


def test_every_file_has_its_test() -> None:
    files = (file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py"))
    names = {file.as_posix() for file in files if file.name != "__init__"}
    mirrored = {
        name
        for name in names
        if (TESTS / "unit" / Path(name).parent / f"test_{Path(name).name}.py").is_file()
    }
    assert names - mirrored == WHOSE.keys()
    assert all((TESTS / f"{test}.py").is_file() for test in WHOSE.values())
