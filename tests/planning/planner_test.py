"""Plans: targets, tasks without data, predictions from the traced step and from compiled programs, and errors."""

import dataclasses
import json
import math

import jax
import pytest
from paths import CONFIGS

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.models.ops import implementations
from beitv2_jax.planning import abstract_task, command, planner, search, topologies
from beitv2_jax.planning.chips import CHIPS
from beitv2_jax.planning.planner import _out_of_memory
from beitv2_jax.training import sharding
from tests.planning.small_configs import small


def load(name, arg="", **keys):
    config = config_lib.load(f"{CONFIGS / name}.py:{arg}").copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(keys)
    return config.lock()


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5e:64", "v5e:8x8", 64),
        ("v6e:512", "v6e:16x16*2", 512),
        ("v5e:4x4*3", "v5e:4x4*3", 48),
        ("v5p:64", "v5p:4x4x4", 64),
        ("v4:1", "v4:1x1x1", 1),
        ("v5p:1024", "v5p:8x8x16", 1024),
        ("h100:8", "h100:8", 8),
        ("a100:2", "a100:2", 2),
        ("h200:64", "h200:64", 64),
    ],
)
def test_targets_are_read(text, name, count):
    target = topologies.parse(text)
    assert (target.name, target.count) == (name, count)
    assert topologies.parse(target.name) == target
    assert len(target.network().slices) == count


@pytest.mark.parametrize(
    ("text", "said", "instead"),
    [
        ("v7x:8", "no chip 'v7x'", "v6e"),
        ("v5e", "not a target", "v5e:16x16"),
        ("v6e-16", "not a target", "v5e:16x16"),
        ("v5e:12", "no slice of 12 chips", "1, 4, 8, 16"),
        ("v5e:2x2x2", "2 dimensions", "--plan=v5e:16x16"),
        ("v5p:4x4", "3 dimensions", "--plan=v5p:8x8x16"),
        ("h100:12", "not a whole number of hosts", "--plan=h100:16"),
        ("v5e:0", "no chips", "v5e:8"),
    ],
)
def test_targets_that_do_not_exist(text, said, instead):
    with pytest.raises(UserError) as caught:
        topologies.parse(text)
    assert said in caught.value.happened and instead in caught.value.instead


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_kind_of_chip_is_rented_from_one_to_256(chip):
    counts = [target.count for target in topologies.rented(chip)]
    assert counts[0] == 1 and counts[-1] == 256


@pytest.mark.parametrize("name", ["mim", "vqkd", "finetune"])
def test_the_described_batch_is_that_of_the_data_pipeline(name):
    config, notes = abstract_task.complete(load(name))
    batch = abstract_task.describe(config, 10_000).batch
    assert {leaf.shape[0] for leaf in batch.values()} == {config.run.batch_size}
    assert batch["images"].shape[1:] == (224, 224, 3) and batch["images"].dtype == "uint8"
    assert ("mask" in batch) == (name == "mim") and "faults" not in batch
    assert bool(notes) == (name != "finetune")


def test_a_described_task_is_the_real_one_without_its_weights():
    """The state of a stage whose inputs are described is that of one whose inputs are open."""
    stage = planner.prepare(small("mim"), 100)
    assert jax.tree.structure(stage.state.params) == jax.tree.structure(stage.state.opt_state[1].mu)
    assert stage.frozen == {} and stage.batch["code_ids"].shape == (7, 9)


def test_a_tokenizer_run_is_described_by_its_config(tmp_path):
    trained = small("vqkd")
    (tmp_path / "config.json").write_text(config_lib.to_json(trained))
    config, notes = abstract_task.complete(
        load("mim", "smoke", **{"views.image_size": 48, "masking.num_masked": 5, "tokenizer.run": str(tmp_path)})
    )
    assert notes == ()
    description = abstract_task.describe(config, 100)
    kernel = description.task.frozen["tokenizer"]["params"]["encoder"]["blocks_2"]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (24, 40)


def test_a_config_with_a_cache_needs_no_cache():
    config, notes = abstract_task.complete(load("mim", **{"tokenizer.codes": "nowhere"}))
    assert notes == () and config.views.num_views == 1
    assert abstract_task.describe(config, 10_000).batch["code_ids"].shape == (2048, 196)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("tfds:imagenet2012", 1_281_167),
        ("tfds:imagenet2012_subset/10pct:5.0.0", 128_116),
        ("folder:data/imagenet-21k", 14_197_122),
        ("folder:x/imagenet22k", 14_197_122),
    ],
)
def test_known_sets_need_not_be_there(source, count):
    assert abstract_task.count_examples(load("mim", **{"data.source": source})) == count


@pytest.mark.parametrize(("amount", "count"), [("5 shots", 5000), ("10%", 128_117), ("", 1_281_167)])
def test_few_labels_make_a_short_epoch(amount, count):
    assert abstract_task.count_examples(load("finetune", **{"data.train_labels": amount})) == count


def test_a_set_of_unknown_length_is_an_error_and_a_number_helps():
    config = load("mim", **{"data.source": "folder:/nowhere/of/mine"})
    with pytest.raises(UserError, match="--plan_examples=1281167"):
        abstract_task.count_examples(config)
    assert abstract_task.count_examples(config, 77) == 77


@pytest.mark.parametrize(("name", "stage"), [("extract", "extract"), ("quickstart", "pipeline")])
def test_stages_that_train_nothing_have_no_plan(name, stage):
    with pytest.raises(UserError, match=f"stage '{stage}'"):
        abstract_task.complete(load(name))


@pytest.fixture(scope="module")
def tiny():
    return planner.prepare(small("mim", **{"run.batch_size": 64}), 1000)


def test_a_prediction_by_hand(tiny):
    plan = planner.predict(tiny, topologies.parse("v5e:2x4"))
    params = sum(leaf.size for leaf in jax.tree.leaves(tiny.state.params))
    assert plan.mesh == {"data": 8, "fsdp": 1, "tensor": 1} and not plan.compiled
    assert plan.memory.arguments == pytest.approx(
        3 * 4 * params + sum(_bytes(x) for x in tiny.batch.values()) / 8, rel=1e-3
    )
    (reduced,) = plan.collectives
    assert (reduced.kind, reduced.bytes, reduced.axes(plan.mesh)) == ("all-reduce", 4 * params, ("data",))
    assert plan.interconnect_s == pytest.approx(2 * 4 * params * 7 / 8 / 100e9)
    assert plan.compute_s == pytest.approx(8 * sum(part.flops for part in plan.components) / 197e12)
    assert plan.step_s == max(plan.compute_s, plan.hbm_s) + plan.interconnect_s
    assert plan.num_steps == 1600 * (1000 // 64)
    assert plan.hours == pytest.approx(plan.num_steps * plan.step_s / 3600)
    assert plan.chip_hours == pytest.approx(8 * plan.hours)
    assert plan.images_per_second == pytest.approx(64 / plan.step_s)


def _bytes(leaf):
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def test_fsdp_divides_the_state_and_adds_its_exchanges(tiny):
    target = topologies.parse("v5e:2x4")
    whole = planner.predict(tiny, target)
    shared = planner.predict(tiny, target, {"data": 2, "fsdp": 4, "tensor": 1})
    assert shared.memory.arguments < 0.7 * whole.memory.arguments
    kinds = {collective.kind: collective for collective in shared.collectives}
    assert set(kinds) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert kinds["all-gather"].axes(shared.mesh) == ("fsdp",) and kinds["all-gather"].count == 2
    assert kinds["all-reduce"].bytes < 0.7 * whole.collectives[0].bytes


@pytest.mark.long
def test_implementations_are_those_of_the_target():
    stages = {platform: planner.prepare(load("vqkd"), platform=platform) for platform in ("tpu", "cuda")}
    chosen = {platform: stage.config.efficiency for platform, stage in stages.items()}
    assert chosen["tpu"].nearest_code == implementations.AUTO["nearest_code"]["tpu"]
    assert chosen["cuda"].nearest_code == implementations.AUTO["nearest_code"]["gpu"] != chosen["tpu"].nearest_code


def test_exact_products_cost_their_own_rate():
    stage = planner.prepare(small("vqkd"), 100)
    plan = planner.predict(stage, topologies.parse("v5e:1"))
    exact = sum(part.exact_flops for part in plan.components)
    assert exact > 0
    plain = sum(part.flops for part in plan.components) - exact
    assert plan.compute_s == pytest.approx(7 * (plain / 197e12 + exact / (197e12 / 6)))


def test_a_batch_that_cannot_be_divided(tiny):
    with pytest.raises(UserError, match="batch_size=256"):
        planner.predict(tiny, topologies.parse("v5e:256"))


def test_the_memory_in_the_message_of_a_tpu_compiler_is_read():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 45.40G of 15.75G hbm. Exceeded hbm capacity by 29.65G."
    )
    memory = _out_of_memory(message, 2**30)
    assert memory.peak == pytest.approx(45.40 * 2**30) and memory.usable == pytest.approx(15.75 * 2**30)
    assert memory.temporaries + memory.arguments == memory.peak and memory.excess > 0
    assert _out_of_memory("INTERNAL: something else", 1) is None


def test_a_message_about_the_temporaries_alone_is_read():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.85G) exceeds "
        "available HBM (15.75G)."
    )
    memory = _out_of_memory(message, 2**30)
    assert memory.temporaries == pytest.approx(18.85 * 2**30) and memory.peak == memory.temporaries + 2**30
    assert memory.usable == pytest.approx(15.75 * 2**30)


@pytest.mark.long
def test_a_compiled_program_takes_the_place_of_estimates(tiny):
    """What `compile_and_predict` does with a TPU's program, done with one of the CPU's devices."""
    mesh = sharding.make_mesh()
    stage, target = tiny.placed(mesh), topologies.parse("v5e:2x4")
    network = target.network()
    estimated = planner._from_trace(stage, target, dict(mesh.shape), network)
    plan = planner._from_compiled(estimated, planner._compile(stage, mesh, target), network, 1.0)
    assert plan.compiled and plan.memory.arguments > 0 and plan.memory.temporaries > 0
    assert plan.compiled_flops == plan.traced_flops == 8 * tiny.cost.flops
    reduced = sum(c.count * c.bytes for c in plan.collectives if c.kind == "all-reduce")
    params = 4 * sum(leaf.size for leaf in jax.tree.leaves(tiny.state.params))
    assert params <= reduced < 1.1 * params
    assert not [c for c in plan.collectives if c.kind == "all-gather"]
    json.dumps(plan.metrics())


@pytest.fixture(scope="module")
def base():
    """Three blocks of the published base network, which are quick to trace, with a batch that fills a chip."""
    blocks = {"model.depth": 3, "model.early_layer": 2, "run.batch_size": 5120}
    return planner.prepare(load("mim", **{"tokenizer.codes": "stored"}, **blocks))


def test_a_step_that_does_not_fit_names_what_helps(base):
    target = topologies.parse("v5e:2x4")
    plan = planner.predict(base, target)
    assert not plan.fits and plan.memory.excess > 2**30
    remedies = {line.split(":")[0]: line for line in search.with_remedies(plan, base, confirm=None).remedies}
    assert remedies["--config.efficiency.remat=full"].endswith("GiB per chip (traced), fits")
    assert "GiB are missing" in remedies["--config.efficiency.remat=dots"]
    assert "GiB are missing" in remedies["--config.efficiency.accumulation_steps=2"]
    assert remedies["--config.efficiency.accumulation_steps=4"].endswith("fits")
    assert "GiB are missing" in remedies["--config.mesh.fsdp=8 --config.efficiency.remat=none"]
    assert "GiB are missing" in remedies["--config.run.batch_size=2560"]
    assert remedies["--config.run.batch_size=1280"].endswith("fits")
    assert remedies["In short"] == "In short: --config.efficiency.remat=full"


def test_the_first_change_that_should_fit_is_compiled_and_the_rest_is_scaled(base):
    """A compiler that needs two and a half times the memory refuses what fits by estimate."""
    target, asked = topologies.parse("v5e:2x4"), []

    def enlarged(step, target):
        asked.append(step.config.efficiency.to_dict())
        made = planner.predict(step, target)
        memory = dataclasses.replace(made.memory, peak=2.5 * made.memory.peak)
        return dataclasses.replace(made, memory=memory, compile_s=1.0)

    refused = enlarged(base, target)
    remedies = search.with_remedies(refused, base, confirm=enlarged).remedies
    assert [efficiency["accumulation_steps"] for efficiency in asked] == [1, 8]
    assert [line.endswith("(compiled), fits") for line in remedies].count(True) == 1
    assert "GiB are missing" in remedies[1] and remedies[1].startswith("--config.efficiency.remat=full: ")
    assert remedies[-1] == "In short: --config.efficiency.accumulation_steps=8"


def test_the_best_of_many_fit_and_are_in_order(base):
    plans = search.find_best(base, "v5e:64", make=None, minutes=0)
    assert 1 <= len(plans) <= 5 and all(plan.fits and plan.target.count == 64 for plan in plans)
    assert plans[0].mesh["data"] == 64  # weights that are gathered take longer
    hours = [plan.hours for plan in plans]
    assert hours == sorted(hours)
    assert len({tuple(plan.mesh.values()) for plan in plans}) == len(plans)


@pytest.mark.long
def test_a_frozen_backbone_is_planned_without_remat():
    step = planner.prepare(small("segment_linear", **{"run.batch_size": 64}), 1000)
    plans = search.find_best(step, "v5e:8", make=None, minutes=0)
    assert plans and not any("efficiency.remat" in search.config_keys(plan) for plan in plans)
    tight = dataclasses.replace(plans[0].memory, peak=plans[0].memory.usable + 1)
    refused = search.with_remedies(dataclasses.replace(plans[0], memory=tight), step, confirm=None)
    assert refused.remedies and not any("remat" in remedy for remedy in refused.remedies)


@pytest.mark.long
def test_of_each_number_of_chips_the_best_two_are_shown(base):
    plans = search.find_best(base, "v5e", make=None, minutes=0)
    counts = [plan.target.count for plan in plans]
    assert len(counts) == 5 and all(counts.count(count) <= 2 for count in counts)


def test_the_best_are_compiled_until_the_time_is_over_and_those_refused_are_left_out(tiny, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(search.time, "monotonic", lambda: now[0])

    def make(stage, target):
        made = planner.predict(stage, target)
        now[0] += 60
        size = made.memory.usable + 1 if made.mesh == refused else made.memory.peak
        memory = dataclasses.replace(made.memory, peak=size)
        return dataclasses.replace(made, memory=memory, compiled=True, compile_s=60.0)

    estimated = search.find_best(tiny, "v5e:2x4", make=None, minutes=0)
    assert {plan.compiled for plan in estimated} == {False} and len(estimated) == 5
    refused = estimated[1].mesh
    best = search.find_best(tiny, "v5e:2x4", make=make, minutes=3)
    assert 1 < now[0] / 60 <= 3 and len(best) == 5
    tried = [plan.mesh for plan in estimated[: int(now[0]) // 60]]
    assert [plan.mesh for plan in best if plan.compiled] == [mesh for mesh in tried if mesh != refused]
    assert refused in tried and refused not in [plan.mesh for plan in best]


def test_a_step_is_traced_again_only_where_the_cost_of_an_image_changes(tiny):
    target = topologies.parse("v5e:2x4")
    same = planner.varied(tiny, **{"run.batch_size": 32, "efficiency.accumulation_steps": 2, "mesh.fsdp": 2})
    assert same.cost is tiny.cost and same.batch["images"].shape[0] == 32
    halved = planner.predict(same, target)
    assert halved.traced_flops == planner.predict(tiny, target).traced_flops / 2
    assert planner.varied(tiny, **{"efficiency.remat": "full"}).cost.flops > tiny.cost.flops


def test_nothing_fits(base):
    with pytest.raises(UserError, match=r"lacks [\d.]+ GiB"):
        search.find_best(planner.varied(base, **{"run.batch_size": 2**20}), "v5e:1", make=None, minutes=0)


def test_a_missing_tpu_compiler_is_named_with_its_extra(monkeypatch, tiny):
    monkeypatch.setattr(topologies, "is_installed", lambda platform: False)
    with pytest.raises(UserError) as caught:
        planner.compile_and_predict(tiny, topologies.parse("v5e:2x4"))
    assert "libtpu" in caught.value.happened and "pip install -e '.[plan]'" in caught.value.instead


def test_without_a_gpu_compiler_the_prediction_follows_the_trace_and_says_so(monkeypatch, tiny):
    monkeypatch.setattr(topologies, "is_installed", lambda platform: False)
    plan = command.make_prediction(tiny, topologies.parse("h100:8"))
    assert not plan.compiled and any("plan-gpu" in note for note in plan.notes)


def test_the_command_prints_and_keeps_a_plan(tmp_path, capsys):
    config = load("mim", "smoke", **{"tokenizer.codes": "stored"})
    metrics = command.run_plan(config, "v5e:2x4", str(tmp_path / "w"), num_examples=80, compile_it=False)
    printed = capsys.readouterr().out
    assert "v5e:2x4" in printed and "traced" in printed and "bottleneck" in printed
    assert json.loads((tmp_path / "w/plan.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["chips"] == 8 and metrics["num_steps"] == 4 and metrics["memory_per_chip"]["fits"]
    assert list((tmp_path / "w").iterdir()) == [tmp_path / "w/plan.json"]


def test_plans_are_compared_in_a_table(tmp_path, capsys):
    config = load("mim", "smoke", **{"tokenizer.codes": "stored"})
    metrics = command.run_plan(config, "auto:v5e:8", num_examples=80, compile_it=False)
    printed = capsys.readouterr().out
    assert len(metrics["best"]) == len([line for line in printed.splitlines() if line.startswith("| v5e:2x4")])
    mesh = metrics["best"][0]["mesh"]
    assert f"--plan=v5e:2x4 --config.mesh.data={mesh['data']} --config.mesh.fsdp={mesh['fsdp']}" in printed


def test_excess_memory_is_never_negative(tiny):
    plan = planner.predict(tiny, topologies.parse("v5p:8"))
    assert plan.fits and plan.memory.excess == 0
    full = dataclasses.replace(plan.memory, peak=plan.memory.usable + 5)
    assert full.excess == 5 and not dataclasses.replace(plan, memory=full).fits
