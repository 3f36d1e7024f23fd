"""The tokenizer and its quantizer against the released ones: outputs, gradients, and how the codebook moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden_files import Golden, channels_last

from beitv2_jax.convert.beit.official import from_official, to_official
from beitv2_jax.models import quantizer as q
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks.losses import cosine_distillation


def vectors(maps):
    """Return (b, c, h, w) as (b, n, c)."""
    return jnp.asarray(maps).transpose(0, 2, 3, 1).reshape(maps.shape[0], -1, maps.shape[1])


def maps(vectors, like):
    return np.asarray(vectors).reshape(like.shape[0], *like.shape[2:], like.shape[1]).transpose(0, 3, 1, 2)


class QuantizerCase:
    """One situation of quantizer.npz: the module, its state in our names, its inputs, and checks by short name."""

    def __init__(self, golden, name):
        sizes = golden.config["cases"][name]
        self.golden, self.name = golden, name
        self.module = q.Quantizer(
            q.QuantizerOptions(
                codebook_size=sizes["n_embed"],
                code_dim=sizes["dim"],
                ema_decay=sizes["decay"],
                commitment_weight=sizes["beta"],
            )
        )
        self.inputs = golden.section(f"in/{name}/")
        zeros = jnp.zeros(sizes["n_embed"])
        self.state = {
            "codebook": jnp.asarray(golden.state[f"{name}.embedding.weight"]),
            "cluster_counts": jnp.asarray(golden.state[f"{name}.cluster_size"]),
            "window_counts": zeros,
            "last_window_counts": zeros,
        }

    def step(self, z, train):
        @jax.jit
        def compute(state, projections):
            out = self.module.apply({"codebook": state}, projections)
            return out, q.updated_state(state, out.statistics, self.module.options, move=train)

        out, self.state = compute(self.state, vectors(z))
        return out

    def check(self, name, value):
        self.golden.check(f"{self.name}/{name}", value)

    def check_step(self, out, z, suffix=""):
        self.check(f"ids{suffix}", out.code_ids.reshape(z.shape[0], *z.shape[2:]))
        self.check(f"loss{suffix}", out.commitment.mean())

    def check_state(self, suffix=""):
        self.check(f"codebook_after{suffix}", self.state["codebook"])
        self.check(f"cluster_size_after{suffix}", self.state["cluster_counts"])


def check_quantizer(golden: Golden):
    check_one_step(QuantizerCase(golden, "basic"))
    check_unused_codes(QuantizerCase(golden, "unused"))
    check_eval_mode(QuantizerCase(golden, "evalmode"))
    for name in ("kmeans", "kmeans_empty"):
        check_kmeans_start(QuantizerCase(golden, name))


def check_one_step(case):
    z, probe, variables = case.inputs["z"], vectors(case.inputs["probe"]), {"codebook": case.state}

    def objective(projections):
        out = case.module.apply(variables, projections)
        return jnp.sum(out.codes * probe) + out.commitment.mean()

    case.check("grad_z", maps(jax.jit(jax.grad(objective))(vectors(z)), z))
    out = case.step(z, train=True)
    case.check_step(out, z)
    case.check("z_q", maps(out.codes, z))
    case.check_state()


def check_unused_codes(case):
    for step, z in enumerate(case.inputs["z"]):
        out = case.step(z, train=True)
        case.check_step(out, z, f"_{step}")
        case.check_state(step + 1)
    case.check("z_q_4", maps(out.codes, z))


def check_eval_mode(case):
    before = case.state["codebook"]
    for step, z in enumerate(case.inputs["z"]):
        case.check_step(case.step(z, train=False), z, f"_{step}")
        case.check(f"cluster_size_after{step + 1}", case.state["cluster_counts"])
    np.testing.assert_array_equal(case.state["codebook"], before)


def check_kmeans_start(case):
    z = case.inputs["z"]
    unit = q.l2_normalise(vectors(z)).reshape(-1, z.shape[1])
    case.check("samples_l2", unit)
    for rounds in (1, 10):
        kmeans = jax.jit(functools.partial(q.kmeans_from, num_iters=rounds))
        means, counts = kmeans(unit, unit[case.inputs["init_indices"]])
        case.check(f"means_iter{rounds}", means)
        case.check(f"bins_iter{rounds}", counts)
    case.state = {**case.state, "codebook": means}
    out = case.step(z, train=True)
    case.check_step(out, z)
    case.check("z_q", maps(out.codes, z))
    case.check_state()
    # the start writes its counts and a flag to buffers that are never read again
    case.check("embedding_cluster_size_after", counts)
    case.check("initted_after", np.ones(1))
    case.golden.check_unmoved(f"{case.name}/embed_avg_after", case.golden.state[f"{case.name}.embedding.embed_avg"])


def vqkd_arguments(config):
    """Return the arguments of a `VQKD`, without those that a vqkd config keeps elsewhere."""
    sizes = {
        side: dict(
            width=config[side]["embed_dim"],
            depth=config[side]["depth"],
            num_heads=config[side]["num_heads"],
            mlp_dim=int(config[side]["mlp_ratio"] * config[side]["embed_dim"]),
        )
        for side in ("encoder", "decoder")
    }
    return dict(
        encoder=dict(patch_size=config["encoder"]["patch_size"], **sizes["encoder"]),
        decoder=sizes["decoder"],
        codebook_size=config["n_embed"],
        code_dim=config["embed_dim"],
        ema_decay=config["decay"],
    )


def check_vqkd(golden: Golden):
    config = golden.config
    sizes = {"image_size": config["encoder"]["img_size"], "teacher_width": config["decoder_out_dim"]}
    model = VQKD.from_arguments({**sizes, **vqkd_arguments(config)})
    variables = jax.tree.map(jnp.asarray, from_official("vqkd", golden.state))
    check_eval_outputs(golden, model, variables)
    check_training(golden, model, variables)


def in_tokenizer_range(images):
    """Golden images are [0, 1], channels first; ours are [-1, 1], channels last."""
    return channels_last(images) * 2.0 - 1.0


def check_eval_outputs(golden, model, variables):
    images = in_tokenizer_range(golden.arrays["in/image"])
    golden.check("eval/pre_processed", np.moveaxis(np.asarray(images), -1, 1))
    out = jax.jit(lambda images: model.apply(variables, images, train=False))(images)
    ids = jax.jit(lambda images: model.apply(variables, images, method=model.encode))(images)
    np.testing.assert_array_equal(ids, out.code_ids)
    golden.check("eval/token_ids", ids)
    golden.check("eval/encoder_patch_features", out.encoder_features)
    golden.check("eval/to_quantizer_features", out.projections)
    golden.check("eval/z_l2", out.unit)
    golden.check("eval/z_q", maps(out.codes, golden.arrays["out/eval/z_q"]))
    state = variables["codebook"]["quantizer"]
    state = q.updated_state(state, out.statistics, model.quantizer, move=False)
    golden.check("eval/code_vectors", state["codebook"][out.code_ids])
    golden.check("eval/cluster_size_after", state["cluster_counts"])
    golden.check("eval/decoder_patch_features", out.decoder_features)
    golden.check("eval/rec", out.reconstruction)
    distance = cosine_distillation(out.reconstruction, jnp.asarray(golden.arrays["in/target"])).mean()
    golden.check("eval/rec_loss", distance)
    golden.check("eval/commit_loss", out.commitment.mean())
    golden.check("eval/total_loss", distance + out.commitment.mean())


def check_training(golden, model, variables):
    def loss(params, codebook, images, target):
        out = model.apply({"params": params, "codebook": codebook}, images, train=True)
        distance = cosine_distillation(out.reconstruction, target).mean()
        return distance + out.commitment.mean(), (distance, out)

    value_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    params, codebook = variables["params"], variables["codebook"]
    batches = zip(
        in_tokenizer_range(golden.arrays["in/images_train"]),
        jnp.asarray(golden.arrays["in/targets_train"]),
        strict=True,
    )
    for step, (images, target) in enumerate(batches):
        (total, (distance, out)), gradients = value_and_gradient(params, codebook, images, target)
        state = q.updated_state(codebook["quantizer"], out.statistics, model.quantizer)
        codebook = {"quantizer": state}
        golden.check(f"train/step{step}/token_ids", out.code_ids)
        golden.check(f"train/step{step}/total_loss", total)
        golden.check(f"train/step{step}/rec_loss", distance)
        golden.check(f"train/step{step}/commit_loss", out.commitment.mean())
        if step == 0:
            official = to_official("vqkd", {"params": gradients, "codebook": codebook})
            gradients = {name: value for name, value in official.items() if not name.startswith("quantize.")}
            golden.check_gradients(gradients, "train/grad/")
        if step in (0, 2):
            golden.check(f"train/after{step + 1}/codebook", state["codebook"])
            golden.check(f"train/after{step + 1}/cluster_size", state["cluster_counts"])
