"""Lists, options, files and tables of the step benchmarks; no figure of a measurement is checked."""

import json
import math

import pytest

from beitv2_jax.errors import UserError
from benchmarks import cases, growth, profile, report, run, timing
from benchmarks.configs import load_config
from benchmarks.pages import write_between

MACHINE = {"device": "cpu", "platform": "cpu", "driver": "", "processor": "P", "cores": 2, "python": "3", "commit": "c"}
MACHINE |= {"versions": {"jax": "0.1"}, "date": "2026-01-01"}


def rate(*values):
    return {"batch_size": 2, "images_per_second": timing.spread(list(values)), "utilisation": None, "what": "w"}


def measured(results, **machine):
    options = {"quick": True, "changes": {}, "images": ""}
    return {"options": options, "environment": {**MACHINE, **machine}, "command": "the command", "results": results}


def test_the_list_needs_nothing(capsys):
    assert run.main(["--list"]) == 0
    assert "mim_base_stored" in capsys.readouterr().out


def test_all_are_run_but_what_must_be_named(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "measure_all", lambda names, arguments: asked.append(names) or 0)
    run.main(["--out=x"])
    run.main(["--out=x", "--only=pace,jitter"])
    assert set(cases.CASES) - set(asked[0]) == {"pace"} and asked[1] == ["pace", "jitter"]


def test_an_unknown_name_or_key_is_told():
    with pytest.raises(UserError, match="Did you mean 'mim_base_live'"):
        run.main(["--out=x", "--only=mim_base_life"])
    with pytest.raises(UserError, match=r"efficiency\.remat"):
        run.main(["--out=x", "--only=jitter", "--set=efficiency.remap=full"])


def test_changes_reach_the_configs_that_have_them():
    changes = dict(map(run.change, ["run.batch_size=7", "efficiency.remat=full", "model.num_classes=5"]))
    assert changes == {"run.batch_size": 7, "efficiency.remat": "full", "model.num_classes": 5}
    found = load_config("mim_base", quick=True, changes=changes)
    assert (found.run.batch_size, found.efficiency.remat, "num_classes" in found.model) == (7, "full", False)


def test_a_file_of_another_machine_is_not_added_to(tmp_path):
    out, described = tmp_path / "out.json", measured({"jitter": {"rounds": []}})
    assert run._known(out, described) == {}
    out.write_text(json.dumps(described))
    asked = {key: described[key] for key in ("options", "environment")}
    assert run._known(out, {**asked, "environment": {**MACHINE, "date": "another"}}) == {"jitter": {"rounds": []}}
    with pytest.raises(UserError, match="device 'cpu', this run has 'H200'"):
        run._known(out, {**asked, "environment": {**MACHINE, "device": "H200"}})


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.7])
def test_an_exponent_is_found_again(exponent):
    sizes = (3, 7, 19, 53)
    found = growth.fit(sizes, [5.0 * size**exponent for size in sizes])
    assert found["exponent"] == pytest.approx(exponent, abs=1e-12) and found["standard_error"] < 1e-12
    assert found["between_neighbours"] == pytest.approx([exponent] * 3, abs=1e-12)
    # what does not follow a power shows in the error: of 1, 2, 6 the slope over 1, 2, 4 and its error by hand
    bent = growth.fit((1, 2, 4), (1, 2, 6))
    slope = math.log(6) / math.log(4)
    middle = math.log(2) - math.log(6) / 2
    assert bent["exponent"] == pytest.approx(slope)
    assert bent["standard_error"] == pytest.approx(abs(middle) * math.sqrt(2 / 3) / (math.sqrt(2) * math.log(2)))


def test_ratios_and_their_range():
    results = {"a": {"rounds": [rate(8.0, 10.0, 12.0)]}, "b": {"rounds": [rate(4.0, 5.0, 8.0)]}}
    assert report.ratio(results, "a", "b") == (2.0, 1.0, 3.0)
    results["a"]["rounds"].append(rate(15.0))
    results["b"]["rounds"].append(rate(5.0))
    assert report.ratio(results, "a", "b") == (2.5, 2.0, 3.0)
    results["b"]["rounds"] = [{"what": "w", "skipped": "no torch"}]
    assert report.ratio(results, "a", "b") is None
    assert "`b` skipped: no torch" in report.missing(results)


def test_metrics_of_a_cpu_are_ratios():
    results = {"mim_base_stored": {"rounds": [rate(12345.0)]}, "torch_mim": {"rounds": [rate(5000.0)]}}
    text = report.page(measured(results), "plot.svg")
    assert "12,345" not in text and "12345" not in text and "2.47" in text
    assert "a CPU has no peak" in text and "a CPU's" in text and "the command" in text
    goals = report.goals(results, on_cpu=False)
    assert "a CPU" not in goals and "| 1.5" in goals and "| 55%" in goals


def test_steps_that_took_other_implementations_are_listed_apart():
    taken = {"one": "reference", "two": "reference", "three": "cudnn"}
    results = {name: {"rounds": [{"what": name, "chosen": {"attention": of}}]} for name, of in taken.items()}
    assert (
        report.chosen(results)
        == "- Implementations in one; two: attention reference.\n- Implementations in three: attention cudnn."
    )


@pytest.mark.long
def test_one_measurement_in_a_process_of_its_own(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert run.main([f"--out={out}", "--quick", "--only=jitter,torch_mim", "--set=run.batch_size=2"]) == 0
    written = json.loads(out.read_text())
    (made,) = written["results"]["jitter"]["rounds"]
    assert made["sizes"] == {"images": 2, "image_size": 112}
    assert made["implementations"]["reference"]["seconds"]["low"] > 0
    assert "colour jitter of a batch alone" not in report.page(written, "plot.svg")  # it has one implementation
    assert written["environment"]["platform"] == "cpu" and "benchmarks.run" in written["command"]
    # what does not run where torch is missing says so, and is no failure
    (peer,) = written["results"]["torch_mim"]["rounds"]
    assert "not installed" in peer["skipped"] and "torch_mim" in capsys.readouterr().out


@pytest.mark.long
def test_a_step_is_measured_and_grows(monkeypatch):
    monkeypatch.setitem(growth.DEPTHS, True, (1, 2))
    sizes = {"views.image_size": 32, "run.batch_size": 2, "model.width": 16, "model.mlp_dim": 24, "model.num_heads": 2}
    sizes |= {"model.depth": 1, "model.early_layer": 1, "model.head_depth": 1, "model.codebook_size": 11}
    options, effort = {"quick": True, "changes": sizes}, timing.Effort(0.001, 2)
    made = timing.measure_step(cases.step_of("mim_base_stored", options), effort)
    assert made["flops"]["traced_ratio"] == 1.0 and made["flops"]["compiler_ratio"] == pytest.approx(1.0, rel=0.01)
    assert made["peak_memory"]["bytes"] > 4 * made["parameters"] * 3  # weights and two moments
    assert made["utilisation"] is None  # a CPU is in no table of peaks
    assert len(made["seconds"]["samples"]) == 2
    page = report.page(measured({"mim_base_stored": {"rounds": [{"what": "the step", **made}]}}), "plot.svg")
    (row,) = [line for line in page.splitlines() if line.startswith("| the step")]
    assert "| 1.000 " in row
    assert "- Implementations in all steps: attention reference, cross entropy reference.\n" in page
    curve = growth.over_depth(load_config("mim_base", quick=True, changes=sizes), effort=effort, options=options)
    assert [point["size"] for point in curve["growth"]] == list(growth.DEPTHS[True])
    assert 0 < curve["fits"]["flops"]["exponent"] < 1  # stem and heads do not grow


def test_a_part_is_measured_in_every_form_over_the_codes(monkeypatch):
    monkeypatch.setattr(growth, "CODES", (16, 64))
    options = {"quick": True, "changes": {"views.image_size": 32, "run.batch_size": 2}}
    found = growth.over_codes(load_config("vqkd", quick=True), effort=timing.Effort(0.001, 2), options=options)
    assert set(found["implementations_growth"]) == {"reference", "scan"}  # a kernel is only interpreted here
    reference = found["implementations_growth"]["reference"]
    assert [point["size"] for point in reference["growth"]] == [16, 64] and reference["fits"]["bytes"]["exponent"] > 0
    results = {"growth_codes": {"rounds": [{"what": "w", **found}]}}
    assert [words for words, _, _ in report.curves(results)] == ["w, reference", "w, scan"]
    assert "w, scan" in report.growth(results)
    assert [row.split("|")[2].strip() for row in report.over_sizes(results).splitlines()[2:]] == ["16", "64"]


def test_implementations_at_several_sizes_stand_beside_the_reference():
    def curve(samples, mebibytes):
        return {"growth": [{"size": 8192, "seconds": timing.spread(samples), "bytes": mebibytes * 2**20}]}

    found = {
        "what": "w",
        "implementations_growth": {"reference": curve([4.0, 6.0], 3000), "scan": curve([2.0, 2.0], 750)},
    }
    _, _, row = report.over_sizes({"growth_codes": {"rounds": [found]}}).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["w", "8,192", "scan", "2.50", "2.00 to 3.00", "0.25", "3,000 MiB"]


def test_a_page_keeps_what_stands_beside_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- end -->\nbetween\n<!-- two -->\nkept\n<!-- end -->\nafter\n")
    write_between(page, "one", "new")
    assert page.read_text() == (
        "before\n<!-- one -->\n\nnew\n\n<!-- end -->\nbetween\n<!-- two -->\nkept\n<!-- end -->\nafter\n"
    )


def test_operations_of_a_trace():
    names = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #13(Compute)"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "Launch Stats"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
    ]
    events = [
        {"ph": "X", "pid": 1, "tid": 7, "name": "fusion.12", "dur": 30.0},
        {"ph": "X", "pid": 1, "tid": 7, "name": "fusion.7", "dur": 30.0},
        {"ph": "X", "pid": 1, "tid": 7, "name": "gemm_64x32", "dur": 20.0},
        {"ph": "X", "pid": 1, "tid": 8, "name": "a step", "dur": 999.0},
        {"ph": "X", "pid": 2, "tid": 1, "name": "python", "dur": 999.0},
        {"ph": "X", "pid": 2, "tid": 1, "name": "dot.3", "dur": 20.0, "args": {"hlo_op": "dot.3"}},
    ]
    found = profile.operations([*names, *events], steps=2)
    assert [(one.name, one.calls, one.share) for one in found] == [
        ("fusion", 1.0, 0.6),
        ("gemm_64x32", 0.5, 0.2),
        ("dot", 0.5, 0.2),
    ]
    assert found[0].seconds == pytest.approx(30e-6)
    assert "| fusion | 1 | 0.030 | 60.0% |" in profile.table(found)


def test_a_real_trace_is_read(tmp_path):
    import jax
    import jax.numpy as jnp

    square = jax.jit(lambda x: x @ x)
    jax.block_until_ready(square(jnp.ones((64, 64))))
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(square(jnp.ones((64, 64))))
    found = profile.operations(profile.events_of(tmp_path), steps=1)
    assert found and sum(one.share for one in found) == pytest.approx(1.0)
    with pytest.raises(UserError, match="holds no trace"):
        profile.events_of(tmp_path / "elsewhere")
