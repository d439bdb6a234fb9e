"""The README shows what the code does: its program, its report, its table, its words."""

import os
import re
import subprocess
import sys
from pathlib import Path

from fusion_core import FusionConfig, Registry
from fusion_core.plugins.support_table import support_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_first_program_is_the_example_that_runs() -> None:
    assert blocks("python")[0] == (ROOT / "examples" / "hugging_face.py").read_text(encoding="utf-8")


def test_the_support_table_is_printed_from_the_requirements() -> None:
    core = Registry.load(FusionConfig(order=("aiter", "flashinfer", "reference")))
    assert support_table(core) in (ROOT / "docs" / "support.md").read_text(encoding="utf-8")


def test_every_variable_it_names_is_one() -> None:
    default = FusionConfig()
    for name, value in re.findall(r"`(FUSION_CORE_[A-Z_]+)=([^`]*)`", README):
        os.environ[name] = value
        try:
            assert FusionConfig() != default, name
        finally:
            del os.environ[name]


def test_every_config_it_shows_can_be_made() -> None:
    shown = re.findall(r"`(FusionConfig\(.*?\))`", README)
    assert len(shown) >= 4
    for text in shown:
        assert isinstance(eval(text, {"FusionConfig": FusionConfig}), FusionConfig)


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_first_program_prints_the_report_that_the_readme_shows(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "hugging_face.py"), str(tmp_path / "model")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    (report,) = blocks("text")
    assert report.splitlines()[:7] == ran.stdout[ran.stdout.index("fusion_core:") :].splitlines()[:7]
