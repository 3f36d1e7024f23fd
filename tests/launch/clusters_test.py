"""What is handed to clusters: SLURM with a fake srun, JobSets read back, SkyPilot, images, settings of chips."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from paths import ROOT

LAUNCH = ROOT / "launch"
CHIPS = ("v4", "v5e", "v5p", "v6e", "a100", "h100", "h200")


def write_script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


def launch(tmp_path, script, *arguments, **environment):
    """Run a script; commands it may only name, not call, leave the file `called`."""
    for name in ("gcloud", "kubectl", "xpk", "srun", "scontrol"):
        if not (tmp_path / "bin" / name).exists():
            write_script(tmp_path / "bin" / name, f'touch "{tmp_path}/called"\n')
    return subprocess.run(
        ["sh", str(LAUNCH / script), *arguments],
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "VENV": f"{tmp_path}/venv", **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )


TPU = {"NAME": "mim", "IMAGE": "r/beitv2:tpu", "CLAIM": "disk", "CHIP": "v5e", "TOPOLOGY": "8x16"}
GPU = {"NAME": "mim", "IMAGE": "r/beitv2:cuda", "CLAIM": "disk", "CHIP": "h100", "HOSTS": "5"}
XPK = {"NAME": "mim", "IMAGE": "r/beitv2:tpu", "CLUSTER": "c", "ZONE": "z", "TYPE": "v6e-64", "STORAGE": "runs"}
SLICE = {"NAME": "mim", "ZONE": "z", "TYPE": "v5p-128"}


@pytest.mark.parametrize(
    "script, environment, shown",
    [
        ("local.sh", {}, "venv/bin/python -m beitv2_jax.main --config=c '--workdir=a b'"),
        (
            "local.sh",
            {"PROCESSES": "3", "RESTARTS": "7"},
            "launch/processes.py 3 7 -m beitv2_jax.main --config=c '--workdir=a b'",
        ),
        ("tpu_vm.sh", SLICE, "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --spot --zone=z"),
        ("gke/jobset.sh", TPU, 'args: ["--config=c", "--workdir=a b"]'),
        ("gke/jobset.sh", GPU, 'args: ["--config=c", "--workdir=a b"]'),
        ("gke/xpk.sh", XPK, "--tpu-type=v6e-64 --docker-image=r/beitv2:tpu --storage=runs --max-restarts=100"),
        ("slurm.sbatch", {}, "venv/bin/python -m beitv2_jax.main --config=c '--workdir=a b'"),
    ],
)
def test_a_dry_run_shows_and_does_nothing(tmp_path, script, environment, shown):
    result = launch(tmp_path, script, "--dry-run", "--config=c", "--workdir=a b", **environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert shown in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


# ---- GKE ----


def jobset(tmp_path, environment, *arguments):
    result = launch(tmp_path, "gke/jobset.sh", "--dry-run", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    assert not re.search(r"\$\{\w", result.stdout)
    document = yaml.safe_load(result.stdout)
    [job] = document["spec"]["replicatedJobs"]
    return document, job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("environment", [TPU, GPU], ids=["tpu", "gpu"])
def test_a_jobset_restarts_all_but_not_after_an_error(tmp_path, environment):
    document, job, pod = jobset(tmp_path, {**environment, "RESTARTS": "17"})
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert document["metadata"]["name"] == "mim"
    policy = document["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 17
    [rule] = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    [exits] = job["podFailurePolicy"]["rules"]
    assert exits["action"] == "FailJob" and exits["onExitCodes"]["values"] == [1, 2]  # neither 75 nor a signal
    assert exits["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert (job["backoffLimit"], job["completionMode"], pod["restartPolicy"]) == (0, "Indexed", "Never")
    mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted["runs"] == "/runs" and set(mounted) == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}


@pytest.mark.parametrize(
    "chip, topology, hosts, accelerator",
    [
        ("v5e", "8x16", 32, "tpu-v5-lite-podslice"),
        ("v6e", "4x4", 4, "tpu-v6e-slice"),
        ("v5p", "4x4x8", 32, "tpu-v5p-slice"),
        ("v4", "2x2x4", 4, "tpu-v4-podslice"),
    ],
)
def test_a_slice_gets_all_its_machines(tmp_path, chip, topology, hosts, accelerator):
    _, job, pod = jobset(tmp_path, {**TPU, "CHIP": chip, "TOPOLOGY": topology})
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
        "cloud.google.com/gke-spot": "true",
    }
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [{"name": "CHIP", "value": chip}]


def test_gpu_machines_are_told_their_place(tmp_path):
    document, job, pod = jobset(tmp_path, {**GPU, "SPOT": "false"})
    assert job["parallelism"] == job["completions"] == 5
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    [container] = pod["containers"]
    variables = {entry["name"]: entry.get("value") or entry["valueFrom"] for entry in container["env"]}
    assert variables == {
        "CHIP": "h100",
        "JAX_COORDINATOR_ADDRESS": "mim-workers-0-0.mim:8476",
        "JAX_NUM_PROCESSES": "5",
        "JAX_PROCESS_ID": {
            "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
        },
    }
    assert document["spec"]["network"] == {"enableDNSHostnames": True}


def test_arguments_of_any_kind_arrive(tmp_path):
    arguments = ['--a="b" \\ |&', "--c=it's ${NAME}", "--d=[1, 2]: #"]
    result = launch(tmp_path, "gke/jobset.sh", "--dry-run", *arguments, **GPU)
    job = yaml.safe_load(result.stdout)["spec"]["replicatedJobs"][0]
    assert job["template"]["spec"]["template"]["spec"]["containers"][0]["args"] == arguments


def test_the_yaml_is_applied(tmp_path):
    write_script(tmp_path / "bin/kubectl", f'echo "$*" >"{tmp_path}/arguments"\ncat >"{tmp_path}/input"\n')
    assert launch(tmp_path, "gke/jobset.sh", "--config=c", **GPU).returncode == 0
    assert (tmp_path / "arguments").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "input").read_text())["kind"] == "JobSet"


@pytest.mark.parametrize(
    "changed, word", [({"CHIP": "v9"}, "v5e"), ({"TOPOLOGY": "2x2"}, "8 chips"), ({"CLAIM": ""}, "CLAIM")]
)
def test_slips_of_a_jobset_are_told(tmp_path, changed, word):
    result = launch(tmp_path, "gke/jobset.sh", **{**TPU, **changed})
    assert result.returncode == 2 and word in result.stderr
    assert not (tmp_path / "called").exists()


def test_xpk_restarts_on_the_code_of_a_saved_run(tmp_path):
    result = launch(tmp_path, "gke/xpk.sh", "--dry-run", "--config=c", "--workdir=/runs/a b", **XPK)
    call = shlex.split(result.stdout)
    assert call[:3] == ["xpk", "workload", "create"] and "--restart-on-exit-codes=75" in call
    command = shlex.split(call[-1].removeprefix("--command="))
    assert command == [
        *["cd", "/opt/beitv2_jax", "&&", "CHIP=v6e", "exec"],
        *["sh", "launch/local.sh", "--config=c", "--workdir=/runs/a b"],
    ]


# ---- SLURM ----


def slurm(tmp_path, srun, **environment):
    write_script(tmp_path / "bin/srun", f'env >"{tmp_path}/env"\necho "$*" >>"{tmp_path}/srun"\n{srun}\n')
    write_script(tmp_path / "bin/scontrol", f'echo "$*" >>"{tmp_path}/scontrol"\n')
    write_script(tmp_path / "venv/bin/python", "")
    (tmp_path / "venv/.installed-cuda").touch()
    result = launch(tmp_path, "slurm.sbatch", "--config=c", SLURM_JOB_ID="31", **environment)
    requeued = tmp_path / "scontrol"
    return result, requeued.read_text() if requeued.exists() else None


@pytest.mark.parametrize("code, again", [(0, False), (1, False), (2, False), (75, True), (134, True), (137, True)])
def test_slurm_queues_again_what_saved_or_was_killed(tmp_path, code, again):
    result, requeued = slurm(tmp_path, f"exit {code}")
    assert result.returncode == code
    assert requeued == ("requeue 31\n" if again else None)
    assert (tmp_path / "srun").read_text() == (
        f"--kill-on-bad-exit=1 {tmp_path}/venv/bin/python -m beitv2_jax.main --config=c\n"
    )


def test_slurm_does_not_queue_again_for_ever(tmp_path):
    assert slurm(tmp_path, "exit 75", SLURM_RESTART_COUNT="4", RESTARTS="5")[1]
    (tmp_path / "scontrol").unlink()
    assert slurm(tmp_path, "exit 75", SLURM_RESTART_COUNT="5", RESTARTS="5")[1] is None


def test_a_cancelled_job_is_not_queued_again(tmp_path):
    # scancel ends the steps and this shell
    result, requeued = slurm(tmp_path, "kill -TERM $PPID; exit 143")
    assert (result.returncode, requeued) == (143, None)


@pytest.mark.parametrize("tasks, gpus, devices", [("1", "4", "0,1,2,3"), ("8", "8", None), ("", "", "0,1,2,3,4,5,6,7")])
def test_a_process_alone_on_its_node_has_all_gpus(tmp_path, tasks, gpus, devices):
    given = {"SLURM_NTASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": gpus} if tasks else {}
    slurm(tmp_path, "exit 0", CHIP="h200", **given)
    environment = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert environment.get("JAX_LOCAL_DEVICE_IDS") == devices
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.94"


def test_slurm_directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    directives = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in re.findall("#SBATCH .*", text))
    assert directives["signal"] == "TERM@300"  # to the steps, not to the shell (B:)
    assert {"requeue": "", "open-mode": "append", "ntasks-per-node": "1"}.items() <= directives.items()
    head, _, body = text.partition("\ncd ")
    assert "#SBATCH" not in body and all(line.startswith("#") for line in head.splitlines())  # sbatch reads no further


# ---- SkyPilot, images, chips ----


def test_skypilot(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert task["resources"]["use_spot"] is True
    assert 75 in recovery["recover_on_exit_codes"] and not {0, 1, 2} & set(recovery["recover_on_exit_codes"])
    assert recovery["max_restarts_on_errors"] == 0
    assert task["file_mounts"]["/runs"]["mode"] == "MOUNT"
    assert f"{task['envs']['CHIP']}.env" in os.listdir(LAUNCH / "env")
    write_script(
        tmp_path / "launch/local.sh", 'echo "$EXTRAS $* $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"'
    )
    environment = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    result = subprocess.run(
        ["bash", "-c", task["run"]],
        env={"PATH": os.environ["PATH"], **task["envs"], **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.stdout == f"cuda {task['envs']['ARGS']} 10.0.0.7:8476 2 1\n"


@pytest.mark.parametrize("kind", ["cpu", "cuda", "tpu"])
def test_images(kind):
    text = (LAUNCH / f"docker/{kind}.Dockerfile").read_text()
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert [word for word, _ in lines if word != "ENV"] == ["FROM", "WORKDIR", *["COPY"] * 4, "RUN", "ENTRYPOINT"]
    assert lines[0][1] == "python:3.12-slim"
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(rest for word, rest in lines if word == "ENV")))
    assert variables["VENV"] == "/usr/local"
    assert variables.get("EXTRAS") == (None if kind == "cpu" else kind)
    copied = [name for word, rest in lines if word == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"setup.py", "pyproject.toml", "launch", "configs", "beitv2_jax"} == set(copied)
    assert lines[-1][1] == '["sh", "launch/local.sh"]'  # no shell in between that would keep SIGTERM to itself


SETTINGS = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
OVERLAP = " --xla_gpu_enable_latency_hiding_scheduler=true"


@pytest.mark.parametrize(
    "chip, expected",
    [
        *((chip, ("tpu,cpu", None, None, None)) for chip in ("tpu", "v4", "v5e", "v5p", "v6e")),
        ("cuda", ("cuda", OVERLAP, None, None)),
        ("a100", ("cuda", OVERLAP, None, "0.90")),
        ("h100", ("cuda", OVERLAP, None, "0.90")),
        ("h200", ("cuda", OVERLAP, None, "0.94")),
    ],
)
def test_settings_of_a_chip(chip, expected):
    shown = subprocess.run(
        ["sh", "-c", ". launch/common.sh; env"],
        env={"PATH": os.environ["PATH"], "CHIP": chip},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    variables = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    assert tuple(variables.get(name) for name in SETTINGS) == expected


def test_every_setting_says_why():
    files = {path.stem: path.read_text().splitlines() for path in (LAUNCH / "env").iterdir()}
    assert set(files) == {*CHIPS, "cuda", "tpu"}
    for lines in files.values():
        for above, line in itertools.pairwise(lines):
            assert not line.startswith("export") or above.startswith("#")


def test_the_compiler_knows_the_flags():
    """A flag that XLA does not know ends the program at its start."""
    for flags, code in ((OVERLAP, 0), (OVERLAP + " --xla_gpu_no_such_flag=true", 1)):
        result = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env={"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            capture_output=True,
            timeout=60,
        )
        assert result.returncode == code


def test_an_unknown_chip_is_told(tmp_path):
    result = launch(tmp_path, "local.sh", "--dry-run", CHIP="v9")
    assert result.returncode == 2
    assert "a100" in result.stderr and "v6e" in result.stderr
