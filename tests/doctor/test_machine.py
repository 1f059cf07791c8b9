"""`smolpost doctor --environment`, on this machine and on machines that are made up."""

import importlib.metadata
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from smolpost.cli import main
from smolpost.doctor import environment, machine
from smolpost.doctor.finding import Finding, looked_at
from smolpost.model import varlen_kernels


def found(look, name=None) -> Finding:
    [finding] = [finding for finding in look if name in (None, finding.name)]
    return finding


class Cards:
    """What torch.cuda says of cards of one kind."""

    def __init__(self, patch, count=1, capability=(9, 0), archs=("sm_80", "sm_90"), peers=True, gib=80):
        card = SimpleNamespace(name="Card", major=capability[0], minor=capability[1], total_memory=gib * 2**30)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "get_device_properties", lambda number: card)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        patch.setattr(torch.cuda, "get_arch_list", lambda: list(archs))
        patch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: peers)
        patch.setattr(torch.distributed, "is_nccl_available", lambda: True)
        patch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 1))
        patch.setattr(machine, "_listed", lambda: ["Card, 590.1"])


def test_this_machine(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--environment", "--json", f"run_dir={tmp_path}/new/runs"])
    findings = json.loads(capsys.readouterr().out)
    assert end.value.code == int(any(finding["status"] == "fail" for finding in findings))
    values = {finding["name"]: finding["value"] for finding in findings}
    assert values["torch"].startswith(torch.__version__) and "was not asked" in values["hub"] + "was not asked"
    assert {"python", "packages", "torch", "gpu", "attention", "cores", "memory", "disk", "hub"} <= {
        name.rstrip(" 0") for name in values
    }
    assert not (tmp_path / "new").exists()


def test_words_that_do_not_go_together(capsys):
    def refused(*words):
        with pytest.raises(SystemExit) as end:
            main(["doctor", *words])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "pipeline=tiny does not go with --environment" in refused("--environment", "pipeline=tiny")
    assert "--json goes with --environment" in refused("--json", "pipeline=tiny", "stage=sft")
    assert "--against compares the engines of a stage" in refused("--environment", "--against", "trl")


@pytest.mark.parametrize(
    ("settings", "status", "text"),
    [
        ({}, "ok", "Card, 80 GiB, compute capability 9.0, bf16"),
        ({"capability": (7, 5), "archs": ["sm_75"]}, "slow", "no bf16 and no FlashAttention below 8.0"),
        ({"capability": (12, 0)}, "fail", "this torch has kernels for sm_80, sm_90 only"),
    ],
)
def test_cards(monkeypatch, settings, status, text):
    Cards(monkeypatch, **settings)
    finding = found(machine.devices(), "gpu 0")
    assert finding.status == status and text in finding.value and bool(finding.remedy) == (status != "ok")
    assert found(machine.devices(), "driver").value == "590.1"


def test_several_cards(monkeypatch):
    Cards(monkeypatch, count=2)
    assert found(machine.devices(), "nccl") == ("ok", "nccl", "2.29.1, 2 GPUs with access to each other's memory", "")
    Cards(monkeypatch, count=2, peers=False)
    assert found(machine.devices(), "nccl").status == "slow"
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert found(machine.devices(), "nccl").status == "fail"


def test_a_card_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_listed", lambda: ["Card, 590.1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    finding = found(machine.devices(), "gpu")
    assert finding.status == "fail" and "nvidia-smi lists Card, 590.1, and torch sees none" in finding.value
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert found(machine.devices(), "gpu").status == "slow"


@pytest.mark.parametrize(
    ("capability", "kernel", "value", "remedy"),
    [
        ((8, 0), "torch-varlen", "torch-varlen", ""),
        ((9, 0), "flash-attention-3", "flash-attention-3", ""),
        ((9, 0), "torch-varlen", "torch-varlen; FlashAttention 3 is faster on this card", "flash_attn_interface"),
    ],
)
def test_attention_kernel(monkeypatch, capability, kernel, value, remedy):
    Cards(monkeypatch, capability=capability)
    chosen = varlen_kernels.VarlenKernel(kernel, lambda: None)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kwargs: zeros(*shape, **kwargs))
    monkeypatch.setattr(varlen_kernels, "_fastest", lambda *_: chosen)
    finding = found(machine.attention())
    assert (finding.status, finding.value) == ("ok", value) and remedy in finding.remedy


def test_no_attention_kernel_for_an_old_card(monkeypatch):
    Cards(monkeypatch, capability=(7, 5))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kwargs: zeros(*shape, **kwargs))
    finding = found(machine.attention())
    assert finding.status == "slow" and "needs compute capability 8.0, and this card has 7.5" in finding.remedy


def test_torch_that_cannot_be_imported_is_a_line(monkeypatch, capsys):
    """Also where a look does not expect it, and for the exit code."""
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--environment"])
    text = capsys.readouterr().out
    assert end.value.code == 1 and "Traceback" not in text
    assert "fail  torch " in text and "remedy: pip install --force-reinstall torch" in text
    assert "does not run: torch" in text.replace("\n", " ")


def test_packages(monkeypatch):
    versions = {"rich": "99.0", "trl": "1.0", "peft": None}
    version = importlib.metadata.version

    def fake(name):
        if name in versions and versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or version(name)

    monkeypatch.setattr(importlib.metadata, "version", fake)
    required = ["rich", "trl>=1.16", "peft", "torch>=2.10", "trackio; extra == 'trackers'", "x<1; python_version<'3'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: required)
    findings = list(environment.packages())
    assert [(f.status, f.name) for f in findings] == [("fail", "trl"), ("fail", "peft"), ("note", "packages")]
    assert findings[0].value == "1.0 is not in the range >=1.16" and findings[0].remedy == "pip install 'trl>=1.16'"
    assert "rich 99.0 (15.0.0)" in findings[2].value and "torch" not in findings[2].value


def test_extras(monkeypatch):
    monkeypatch.setattr(environment, "EXTRAS", ("trackers", "gguf"))
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["rich; extra == 'trackers'", "no-such; extra == 'gguf'"]
    )
    complete, lacking = environment.extras()
    assert complete == ("ok", "extras", "trackers", "")
    assert lacking.value == "not installed: gguf (lacks no-such)" and lacking.remedy == "pip install 'smolpost[gguf]'"


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("", None)])
def test_cpu_quota(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert machine.cpu_quota(tmp_path / "cpu.max") == cores
    assert machine.cpu_quota(tmp_path / "none") is None


def test_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda _: None)
    assert found(machine.cores()) == ("ok", "cores", "8 of 16", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert found(machine.cores()).remedy == "set OMP_NUM_THREADS=8"
    monkeypatch.setattr(machine, "cpu_quota", lambda _: 2.5)
    finding = found(machine.cores())
    assert finding.status == "slow" and finding.value == "8 of 16, and the container gives the time of 2.5"
    assert finding.remedy.startswith("set OMP_NUM_THREADS=2")


@pytest.mark.parametrize(("free", "status"), [(100, "ok"), (5, "note"), (0.5, "fail")])
def test_disk_space(monkeypatch, tmp_path, free, status):
    usage = SimpleNamespace(free=free * 2**30, total=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    finding = next(iter(machine.disks(tmp_path / "a" / "b")))
    assert finding.status == status and f"{tmp_path}/a/b: {free:.1f} GiB free" in finding.value
    assert ("set run_dir=FOLDER" in finding.remedy) == (status != "ok")


def test_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=64 * 2**20))
    finding = found(machine.shared_memory(tmp_path))
    assert finding.status == "note" and finding.value.startswith("0.062 GiB: ") and "--shm-size" in finding.remedy


def test_memory(monkeypatch):
    monkeypatch.setattr("smolpost.training.host_memory.free_memory", lambda: 2**31)
    assert found(machine.memory()).status == "slow"


def test_settings_of_accelerate_and_the_hub(monkeypatch, tmp_path):
    for name in [name for name in __import__("os").environ if name.startswith(("ACCELERATE_", "FSDP_", "DEEPSPEED_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert found(environment.accelerate()).status == "ok"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    finding = found(environment.accelerate())
    assert finding.status == "note" and "ACCELERATE_MIXED_PRECISION" in finding.value and "fp16" not in finding.value
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    finding = found(environment.hub(False))
    assert "was not asked" in finding.value and "with a token" in finding.value and "secret" not in finding.value
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    finding = found(environment.hub(True))
    assert finding.status == "fail" and "http://127.0.0.1:9 does not answer (ConnectError)" in finding.value


def test_compiler(monkeypatch):
    monkeypatch.setattr(environment, "_version", lambda name: "1.0")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    assert "without c++, ninja" in found(environment.compiler()).value
    monkeypatch.setattr(machine, "has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert "nvcc" in found(environment.compiler()).value
    monkeypatch.setattr(environment, "_version", lambda name: None)
    assert found(environment.compiler()).status == "ok"


def test_a_look_that_breaks_is_a_finding():
    def breaks():
        yield Finding("ok", "a", "b")
        raise RuntimeError("two\nlines")

    finding = found(looked_at("gpu", breaks))
    assert finding[:3] == ("fail", "gpu", "cannot be looked at (RuntimeError: two lines)")
