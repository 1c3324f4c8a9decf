"""The precision of a run on fake machines: the hardware and its rates are faked, the arithmetic is not."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from short_run import at_step, rows, send

from cozyrag import cli, run
from cozyrag.commands import audit
from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.hub.model_cards import public_settings
from cozyrag.run import train
from cozyrag.runtime import precision
from cozyrag.runtime.precision import MEASURED, Precision, agreed, asked_at_launch, choose, fitting, native_bf16
from cozyrag.runtime.signals import Interrupted
from cozyrag.training import setup

REASON = "a matrix product is 4.3 times as fast as in float32 (846 against 197 GFLOP/s)"
FAST = Precision("bf16", REASON, 197.0, 846.0)
FACTS = {"float32_gflops": 197.0, "bf16_gflops": 846.0, "ratio": 4.29, "reason": REASON}


@pytest.fixture
def machine(monkeypatch):
    """Set a fake machine: whether it has bf16, and the rates that it measures, the last ones for ever; returns a list
    that grows with each measurement."""

    monkeypatch.delenv("COZYRAG_FLOAT32")

    def fake(native, *rates):
        measured = []

        def measure(device="cpu"):
            measured.append(device)
            return rates[min(len(measured), len(rates)) - 1]

        monkeypatch.setattr(precision, "native_bf16", lambda device: native)
        monkeypatch.setattr(precision, "measure_products", measure)
        return measured

    return fake


@pytest.fixture
def own_state():
    """Accelerate keeps the precision of a process's first Accelerator; reset it before and after a test."""
    AcceleratorState._reset_state()
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state()


# ---- the hardware


@pytest.mark.parametrize(
    ("processor", "reported", "native"),
    [
        ("x86_64", set(), False),
        ("x86_64", {"_is_mkldnn_bf16_supported"}, False),  # AVX-512 without bf16
        ("x86_64", {"_is_mkldnn_bf16_supported", "_is_avx512_bf16_supported"}, True),
        ("AMD64", {"_is_mkldnn_bf16_supported", "_is_amx_tile_supported"}, True),
        ("x86_64", {"_is_avx512_bf16_supported"}, False),
        ("aarch64", {"_is_mkldnn_bf16_supported"}, True),
        ("arm64", set(), False),
    ],
)
def test_a_processor_has_bf16_if_onednn_and_the_instructions_agree(processor, reported, native, monkeypatch):
    monkeypatch.setattr(precision.platform, "machine", lambda: processor)
    monkeypatch.setattr(precision, "_reports", lambda owner, name: name in reported)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert native_bf16("cpu") is native
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert native_bf16("cpu") is False


def test_a_check_that_a_version_of_pytorch_lacks_is_false():
    class Old:
        _has = staticmethod(lambda: True)

    assert precision._reports(Old, "_has") is True and precision._reports(Old, "_gone") is False
    assert precision._reports(torch.ops.mkldnn, "_no_such_check") is False


@pytest.mark.parametrize("native", [True, False])
def test_emulation_on_a_gpu_does_not_count(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    assert native_bf16("cuda") is native


# ---- the measurement, on a fake clock that products advance


@pytest.mark.parametrize(
    ("gflops", "size"),
    [({"float32": 197.0, "bfloat16": 846.0}, 2048), ({"float32": 40.0, "bfloat16": 0.5}, 256)],
)
def test_rates_are_those_of_large_products_or_of_small_ones_if_large_ones_take_long(gflops, size, monkeypatch):
    now, sizes = [0.0], []

    def product(rows, kind, device):
        seconds = 2 * rows**3 / gflops[kind] / 1e9
        now[0] += seconds
        sizes.append(rows)
        return seconds

    monkeypatch.setattr(precision, "_product_seconds", product)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])
    assert precision.measure_products() == pytest.approx((gflops["float32"], gflops["bfloat16"]))
    assert sizes[-1] == size and now[0] < 1.5


def test_products_are_computed_and_take_time():
    assert precision._product_seconds(8, "bfloat16", "cpu") > 0


SHAPES = """
from pathlib import Path

import torch

import cozyrag

def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

weight = torch.ones(64, 96, dtype=torch.bfloat16, requires_grad=True)
products = [torch.ones(rows, 96, dtype=torch.bfloat16) @ weight.T for rows in range(100, 110)]
before = megabytes()
for rows in range(110, 310):
    (torch.ones(rows, 96, dtype=torch.bfloat16, requires_grad=True) @ weight.T).sum().backward()
print(megabytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
def test_products_of_many_shapes_keep_few_kernels():
    """By default PyTorch kept a kernel of half a megabyte for each of the 600 shapes: 400 MB."""
    done = subprocess.run(
        [sys.executable, "-c", SHAPES], capture_output=True, text=True, timeout=tiny.PATIENCE, check=True
    )
    assert float(done.stdout) < 150


def test_the_number_of_kernels_can_be_chosen():
    show = "import os, cozyrag; print(os.environ['LRU_CACHE_CAPACITY'], os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    chosen = os.environ | {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"}
    done = subprocess.run(
        [sys.executable, "-c", show], env=chosen, capture_output=True, text=True, timeout=tiny.PATIENCE
    )
    assert done.stdout.split() == ["7", "9"]


# ---- the choice


def test_a_processor_without_bf16_takes_float32_and_nothing_is_measured(machine):
    measured = machine(False, (100.0, 900.0))
    found = fitting("cpu")
    assert found == Precision("no", "this processor has no native bf16") and measured == []
    assert found.sentence() == "precision float32: this processor has no native bf16"
    assert found.facts() == {"float32_gflops": None, "bf16_gflops": None, "ratio": None, "reason": found.reason}


def test_float32_can_be_asked_for_on_every_machine(machine, monkeypatch):
    measured = machine(True, (197.0, 846.0))
    monkeypatch.setenv("COZYRAG_FLOAT32", "1")
    assert choose("cpu").name == fitting("cuda").name == "no" and measured == []
    assert choose("cpu").sentence() == "precision float32: COZYRAG_FLOAT32=1 asks for it"
    assert choose("cpu", "bf16").name == "bf16"


def test_a_processor_with_bf16_takes_it_if_it_is_faster(machine):
    measured = machine(True, (197.0, 846.0))
    found = fitting("cpu")
    assert found == FAST and found.facts() == FACTS and len(measured) == 1
    assert found.sentence() == f"precision bf16: {REASON}"
    measured = machine(True, (200.0, 300.0))
    assert fitting("cpu").name == "bf16" and len(measured) == 1
    measured = machine(True, (200.0, 290.0))
    slow = fitting("cpu")
    assert slow.name == "no" and slow.ratio == 1.45 and len(measured) == precision.TRIES
    assert "in bf16 a matrix product is only 1.4 times as fast (290 against 200 GFLOP/s)" in slow.sentence()


def test_one_disturbed_timing_does_not_decide(machine):
    """Another job that held a core during the timing of bf16 once cost a run of hours its speed."""
    measured = machine(True, (181.0, 211.0), (150.0, 420.0), (181.0, 900.0))
    found = fitting("cpu")
    assert (found.name, found.float32, found.bf16) == ("bf16", 181.0, 420.0) and len(measured) == 2


def test_a_gpu_with_bf16_takes_it_unmeasured_and_other_devices_do_not(machine):
    measured = machine(True)
    assert fitting("cuda").sentence() == "precision bf16: this GPU has it natively"
    assert fitting("mps").name == "no" and measured == []
    machine(False)
    assert fitting("cuda").sentence() == "precision float32: this GPU has no native bf16"


def test_the_choice_of_the_user_is_taken_unmeasured(machine):
    measured = machine(True)
    for device, asked in (("cpu", "bf16"), ("cpu", "no"), ("cuda", "bf16"), ("cuda", "fp16")):
        assert choose(device, asked) == Precision(asked, "as asked for")
    assert measured == []
    machine(False)
    assert choose("cpu", "no").note == "" and choose("mps", "bf16").note == ""
    assert "emulated" in choose("cuda", "bf16").note  # works, with a note


def test_emulated_bf16_is_refused_on_a_cpu_unless_it_is_allowed(machine, monkeypatch):
    machine(False)
    with pytest.raises(
        InputError, match="--mixed_precision bf16: expected .*found .*two to three times slower.*Leave it out"
    ):
        choose("cpu", "bf16")
    monkeypatch.setenv("COZYRAG_ALLOW_EMULATED_BF16", "1")
    assert "emulated" in choose("cpu", "bf16").note
    with pytest.raises(InputError, match="--mixed_precision fp16: expected a GPU"):
        choose("cpu", "fp16")


KEPT_FLOAT32 = Precision("no", "this processor has no native bf16", kept=True)
KEPT_BF16 = Precision("bf16", REASON, 197.0, 846.0, kept=True)


@pytest.mark.parametrize(
    ("kept", "native", "rates", "note"),
    [
        (KEPT_BF16, True, (197.0, 846.0), ""),
        (KEPT_BF16, True, (100.0, 120.0), ""),  # a small gain
        (KEPT_BF16, True, (100.0, 90.0), "bf16 is slower than float32 here (90 against 100 GFLOP/s)"),
        (KEPT_BF16, False, None, "bf16 is only emulated here"),
        (KEPT_FLOAT32, False, None, ""),
        (KEPT_FLOAT32, True, (197.0, 846.0), f"bf16 would be faster here ({REASON})"),
    ],
)
def test_an_interrupted_run_keeps_its_precision_and_notes_if_it_is_slow(kept, native, rates, note, machine):
    machine(native, rates)
    found = choose("cpu", None, kept)
    assert (found.name, found.facts()) == (kept.name, kept.facts())
    assert found.note.startswith(note) and bool(found.note) == bool(note)
    assert found.sentence().endswith("kept, as the run began with it")
    with pytest.raises(InputError, match="fp16"):
        choose("cpu", None, Precision("fp16", "as asked for", kept=True))


def test_processes_take_bf16_only_together_and_report_the_smallest_gain():
    float32, faster = Precision("no", "this processor has no native bf16"), Precision("bf16", "so fast", 100.0, 900.0)
    assert agreed([FAST, float32]) == agreed([float32, FAST]) == float32
    assert agreed([faster, FAST]) == agreed([FAST, faster]) == FAST
    slow = Precision("bf16", "as asked for", note="slow.")
    assert agreed([Precision("bf16", "as asked for"), slow]).note == "slow."


@pytest.mark.parametrize("given", [None, "no", "NO", "bf16", "fp16", "fp8"])
def test_no_from_accelerate_launch_counts_as_nothing_given(given, monkeypatch):
    environment = {} if given is None else {"ACCELERATE_MIXED_PRECISION": given}
    asked = None if given in (None, "no", "NO") else given
    assert asked_at_launch(environment) == asked
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    own = ["--questions", "own.tsv"]
    assert parse_settings(own).training.mixed_precision == asked
    assert parse_settings([*own, "--mixed_precision", "no"]).training.mixed_precision == "no"


# ---- in a run


@pytest.fixture
def auto(short_run):
    """A short run without a setting of the precision."""
    at = short_run.index("--mixed_precision")
    return [*short_run[:at], *short_run[at + 2 :]]


def settings_of(out):
    return json.loads((out / "settings.json").read_text())


def test_a_run_takes_what_fits_and_records_it_everywhere(auto, machine, own_state, tmp_path, capsys):
    out = tmp_path / "out"
    machine(True, (197.0, 846.0))
    train([*auto, "--output_dir", str(out), "--rounds", "0"])
    screen = capsys.readouterr().out
    assert f"\nprecision bf16: {REASON}.\n" in screen and "Note: bf16" not in screen
    assert settings_of(out)["mixed_precision"] == "bf16" and settings_of(out)[MEASURED] == FACTS
    assert rows(out, "run")[0]["precision"] == {"name": "bf16"} | FACTS
    card = (out / "generator" / "README.md").read_text()
    assert f"\nPrecision of training: bf16, {REASON}.\n" in card
    assert "| mixed_precision | bf16 |" in card and MEASURED not in card


def test_a_machine_without_bf16_changes_nothing(auto, machine, tmp_path, capsys):
    out = tmp_path / "out"
    machine(False)
    train([*auto, "--output_dir", str(out), "--rounds", "0"])
    screen = capsys.readouterr().out
    assert "\nprecision float32: this processor has no native bf16.\n" in screen and "Note: bf16" not in screen
    assert settings_of(out)["mixed_precision"] == "no"


@pytest.fixture
def interrupted(auto, machine, own_state, tmp_path):
    """A function that begins a run in an output folder and interrupts it in its generator phase."""

    def begin(native, rates, *more):
        machine(native, rates)
        with pytest.MonkeyPatch.context() as patched:
            at_step(patched, 2, send(15), "generator_step")
            with pytest.raises(Interrupted):
                train([*auto, "--output_dir", str(tmp_path / "out"), *more])
        own_state()
        return tmp_path / "out"

    return begin


def test_an_interrupted_run_resumes_in_bf16_on_a_machine_without_it(auto, interrupted, machine, capsys):
    out = interrupted(True, (197.0, 846.0))
    machine(False)
    with pytest.raises(InputError, match=r"mixed_precision \(was 'bf16', now 'no'\)"):
        train([*auto, "--output_dir", str(out), "--mixed_precision", "no"])
    capsys.readouterr()
    train([*auto, "--output_dir", str(out)])
    screen = capsys.readouterr().out
    assert "precision bf16: kept, as the run began with it." in screen and "Note: bf16 is only emulated here" in screen
    assert settings_of(out)["mixed_precision"] == "bf16" and settings_of(out)[MEASURED] == FACTS
    assert (out / "finished.json").exists()


def test_an_interrupted_run_resumes_in_float32_on_a_machine_with_bf16(auto, interrupted, machine, monkeypatch, capsys):
    out = interrupted(False, None)
    saved = settings_of(out)
    assert saved["mixed_precision"] == "no"
    del saved[MEASURED]  # as earlier versions wrote it
    (out / "settings.json").write_text(json.dumps(saved | {"mixed_precision": None}))
    machine(True, (197.0, 846.0))
    with pytest.raises(InputError, match=r"mixed_precision \(was 'no', now 'bf16'\)"):
        train([*auto, "--output_dir", str(out), "--mixed_precision", "bf16"])
    train([*auto, "--output_dir", str(out)])
    screen = capsys.readouterr().out
    assert (
        "precision float32: kept, as the run began with it." in screen and "Note: bf16 would be faster here" in screen
    )
    assert settings_of(out)["mixed_precision"] == "no"


def test_an_old_run_launched_with_bf16_resumes_in_it(auto, interrupted, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    out = interrupted(True, None)
    (out / "settings.json").write_text(json.dumps(settings_of(out) | {"mixed_precision": None}))
    train([*auto, "--output_dir", str(out)])
    assert settings_of(out)["mixed_precision"] == "bf16"


@pytest.mark.parametrize("way", ["setting", "launcher"])
def test_bf16_on_a_processor_without_it_is_one_error_and_nothing_is_written(
    way, auto, machine, tmp_path, monkeypatch, capsys
):
    machine(False)
    arguments = [*auto, "--output_dir", str(tmp_path / "out")]
    if way == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    else:
        arguments += ["--mixed_precision", "bf16"]
    for command in ("train", "plan", "doctor"):
        monkeypatch.setattr("sys.argv", ["cozyrag", command, *arguments])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert "--mixed_precision bf16: expected a processor with native bf16, found one without" in message
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_one_process_stops_all_and_one_without_bf16_decides(machine, monkeypatch):
    machine(True, (197.0, 846.0))
    slow = Precision("no", "this processor has no native bf16")
    monkeypatch.setattr(setup, "gather_object", lambda mine: [*mine, (slow, None)])
    assert setup._agree_on_precision("cpu", None, None) == slow
    monkeypatch.setattr(setup, "gather_object", lambda mine: [*mine, (None, "refused there")])
    with pytest.raises(InputError, match="refused there"):
        setup._agree_on_precision("cpu", None, None)


def test_processes_that_do_not_see_the_folder_keep_what_the_main_process_keeps(machine, monkeypatch):
    machine(False)
    monkeypatch.setattr(setup, "broadcast_object_list", lambda mine: [KEPT_BF16])
    assert setup._agree_on_precision("cpu", None, None).name == "bf16"


def test_the_plan_probes_in_the_precision_of_the_run_and_names_it(
    auto, machine, own_state, tmp_path, monkeypatch, capsys
):
    machine(True, (197.0, 846.0))
    probed = []
    made = run.make_plan
    monkeypatch.setattr(
        run,
        "make_plan",
        lambda accelerator, *rest: probed.append(accelerator.mixed_precision) or made(accelerator, *rest),
    )
    run.show_plan(parse_settings([*auto, "--output_dir", str(tmp_path / "out")]))
    assert probed == ["bf16"] and f"precision bf16: {REASON}; nothing is trained." in capsys.readouterr().out


# ---- readers of settings.json


def test_the_measurement_is_not_a_setting(tmp_path, monkeypatch):
    monkeypatch.setattr("cozyrag.runtime.precision.native_bf16", lambda device: False)
    settings = parse_settings(["--questions", "own.tsv", "--mixed_precision", "bf16"]).to_dict() | {MEASURED: FACTS}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert MEASURED not in public_settings(settings)
    assert parse_settings(["--config", str(tmp_path / "settings.json")]).training.mixed_precision == "bf16"
    audited = audit.saved_settings(tmp_path)  # an audit trains nothing, so bf16 is accepted
    assert audited.training.mixed_precision is None and audited.data.questions == "own.tsv"
    setup.make_accelerator(audited)
