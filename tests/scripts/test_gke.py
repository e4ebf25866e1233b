"""scripts/gke.sh: the manifest against the schema of the JobSet's fields that it uses, and the commands."""

import itertools
import os
import re
import shlex

import pytest

from tests.scripts.commands import ROOT, TASKS, call, dry, refusal

SCRIPT = "gke.sh"
SLICES = {"NAME": "nyud", "IMAGE": "r-docker.pkg.dev/p/r/taskexpert:1"}
SLICES |= {"ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4"}
RUN = ("gs://bucket/runs/a run", "--config=nyud:vit_l16", TASKS, "--note=$(HOME) & @NAME@ $x")

TEXT, TRUE = {"type": "string", "minLength": 1}, {"const": True}
COUNT = {"type": "integer", "minimum": 1}
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}


def exactly(required: dict, optional: dict | None = None) -> dict:
    """Schema of an object with these fields and no others."""
    fields = {**required, **(optional or {})}
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def each(items: dict) -> dict:
    """Schema of a list that is not empty."""
    return {"type": "array", "items": items, "minItems": 1}


ON_EXIT = exactly({"operator": {"enum": ["In", "NotIn"]}, "values": each(COUNT)}, {"containerName": TEXT})
ON_CONDITION = exactly({"type": TEXT, "status": {"enum": ["True", "False", "Unknown"]}})  # texts, no booleans
POD_FAILURES = exactly(
    {
        "rules": each(
            exactly(
                {"action": {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}},
                {"onExitCodes": ON_EXIT, "onPodConditions": each(ON_CONDITION)},
            )
        )
    }
)
CONTAINER = exactly(
    {"name": TEXT, "image": TEXT, "args": TEXTS},
    {"resources": exactly({"limits": {"type": "object", "additionalProperties": COUNT}})},
)
TOLERATION = exactly(
    {"key": TEXT, "operator": {"enum": ["Equal", "Exists"]}},
    {"value": TEXT, "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]}},
)
POD = exactly(
    {
        "restartPolicy": {"const": "Never"},  # podFailurePolicy needs it
        "containers": each(CONTAINER),
        "nodeSelector": {"type": "object", "additionalProperties": TEXT},
    },
    {
        "terminationGracePeriodSeconds": COUNT,
        "serviceAccountName": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
        "hostNetwork": TRUE,
        "dnsPolicy": {"enum": ["ClusterFirstWithHostNet"]},
        "tolerations": each(TOLERATION),
    },
)
JOB = exactly(
    {"parallelism": COUNT, "completions": COUNT, "template": exactly({"spec": POD})},
    {
        "completionMode": {"enum": ["Indexed", "NonIndexed"]},
        "backoffLimit": {"type": "integer", "minimum": 0},
        "podFailurePolicy": POD_FAILURES,
    },
)
RESTARTS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
FAILURES = exactly(
    {"maxRestarts": COUNT},
    {
        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
        "rules": each(exactly({"name": TEXT, "action": {"enum": RESTARTS}}, {"onJobFailureReasons": TEXTS})),
    },
)
JOBSET = exactly(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": exactly({"name": TEXT}, {"annotations": {"type": "object", "additionalProperties": TEXT}}),
        "spec": exactly(
            {
                "failurePolicy": FAILURES,
                "replicatedJobs": each(
                    exactly({"name": TEXT, "replicas": COUNT, "template": exactly({"spec": JOB})}),
                ),
            }
        ),
    }
)


def manifest(*run: str, **env: str) -> dict:
    """The JobSet that the script prints; it fits the schema."""
    yaml, jsonschema = pytest.importorskip("yaml"), pytest.importorskip("jsonschema")
    done = call(SCRIPT, "manifest", *run, **env)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout)
    jsonschema.Draft202012Validator(JOBSET).validate(found)
    return found


def parts(jobset: dict) -> tuple[dict, dict, dict]:
    """The replicated job, the job's and the pod's specification."""
    (slices,) = jobset["spec"]["replicatedJobs"]
    return slices, (job := slices["template"]["spec"]), job["template"]["spec"]


def test_a_jobset_trains_on_all_hosts_of_the_slices():
    slices, job, pod = parts(manifest(*RUN, **SLICES, SLICES="2"))
    (container,) = pod["containers"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 4, 4, 0)
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["image"] == SLICES["IMAGE"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }


def test_the_program_gets_its_arguments_as_they_were_written():
    """After YAML and after Kubernetes, which reads $$ as $ and would replace $(HOME)."""
    ((container,),) = [parts(manifest(*RUN, **SLICES))[2]["containers"]]
    assert re.search(r"(?<!\$)(\$\$)*\$\(", container["args"][-2]) is None
    read = [argument.replace("$$", "$") for argument in container["args"]]
    assert read == ["train", *RUN, "--preempted_status=143"]


def test_a_preempted_run_restarts_however_often():
    jobset = manifest(*RUN, **SLICES, RESTARTS="3")
    policy = jobset["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert policy["maxRestarts"] == 3
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    _, job, pod = parts(jobset)
    evicted, saved = job["podFailurePolicy"]["rules"]
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (status,) = saved["onExitCodes"]["values"]
    assert f"--preempted_status={status}" in pod["containers"][0]["args"]
    assert saved["onExitCodes"]["containerName"] == pod["containers"][0]["name"]


def test_the_account_is_one_of_kubernetes():
    _, _, pod = parts(manifest(*RUN, **SLICES, SERVICE_ACCOUNT="a@b.iam.gserviceaccount.com"))  # for tpu_queued.sh
    assert pod["serviceAccountName"] == "default"
    _, _, pod = parts(manifest(*RUN, **SLICES, KUBERNETES_SERVICE_ACCOUNT="trainer"))
    assert pod["serviceAccountName"] == "trainer"


def test_spot_nodes_are_chosen_and_tolerated():
    _, _, pod = parts(manifest(*RUN, **SLICES, SPOT="1"))
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert [each["key"] for each in pod["tolerations"]] == ["cloud.google.com/gke-spot"]


@pytest.mark.parametrize(
    ("topology", "per_host", "hosts", "chips"),
    [("1x1", "4", 1, 1), ("2x4", "8", 1, 8), ("2x4", "4", 2, 4), ("2x2x4", "4", 4, 4), ("16x16", "4", 64, 4)],
)
def test_hosts_and_chips_are_those_of_the_topology(topology, per_host, hosts, chips):
    _, job, pod = parts(manifest(*RUN, **{**SLICES, "TOPOLOGY": topology}, CHIPS_PER_HOST=per_host))
    limits = pod["containers"][0]["resources"]["limits"]
    assert (job["parallelism"], limits["google.com/tpu"]) == (hosts, chips)


def test_apply_gives_kubectl_the_manifest():
    done = call(SCRIPT, "--dry-run", "apply", *RUN, **SLICES)
    first, *middle, last = done.stdout.splitlines()
    assert (first, last) == ("kubectl apply --filename=- <<'EOF'", "EOF")
    assert "\n".join(middle) + "\n" == call(SCRIPT, "manifest", *RUN, **SLICES).stdout


def test_apply_runs_kubectl(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/bash\necho "$@" >{tmp_path}/asked; cat >{tmp_path}/manifest\n')
    kubectl.chmod(0o755)
    assert call(SCRIPT, "apply", *RUN, **SLICES, PATH=f"{tmp_path}:{os.environ['PATH']}").returncode == 0
    assert (tmp_path / "asked").read_text() == "apply --filename=-\n"
    assert (tmp_path / "manifest").read_text() == call(SCRIPT, "manifest", *RUN, **SLICES).stdout


def test_other_commands():
    first = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    assert dry(SCRIPT, "logs", DRY_RUN="1", NAME="nyud") == [
        ["kubectl", "logs", "--follow", f"--selector=jobset.sigs.k8s.io/jobset-name=nyud,{first}"]
    ]
    assert dry(SCRIPT, "delete", DRY_RUN="1", NAME="nyud") == [["kubectl", "delete", "jobset", "nyud"]]


def test_xpk_gets_the_command_quoted_for_its_shell():
    ((*launch, command),) = dry(
        SCRIPT, "xpk", *RUN, DRY_RUN="1", CLUSTER="c", TPU_TYPE="v5litepod-16", SLICES="2", NAME="nyud", IMAGE="i"
    )
    assert launch == [
        *("xpk", "workload", "create", "--cluster=c", "--workload=nyud", "--tpu-type=v5litepod-16", "--num-slices=2"),
        *("--docker-image=i", "--max-restarts=10", "--restart-on-exit-codes=1,2"),
        "--termination-grace-period-seconds=300",
    ]
    program = ["exec", "taskexpert", "train", *RUN, "--preempted_status=143"]
    assert shlex.split(command.removeprefix("--command=")) == program


@pytest.mark.parametrize(
    ("arguments", "changed", "line"),
    [
        ((), {}, "which command? scripts/gke.sh [--dry-run] manifest|apply|logs|delete|xpk"),
        (("manifest", "runs/nyud"), {}, "the run must be in a bucket, because the pods share no disk"),
        (("apply", "--config=nyud"), {}, "the run must be in a bucket"),
        (("delete", "other"), {}, "delete takes no argument (the JobSet is that of NAME=...): other"),
        (("manifest", "gs://b/r"), {"IMAGE": ""}, "give IMAGE=...; the head of scripts/gke.sh explains it"),
        (("manifest", "gs://b/r"), {"NAME": "My_Run"}, "NAME=My_Run must have up to 40 lower-case letters"),
        (("manifest", "gs://b/r"), {"TOPOLOGY": "16"}, "TOPOLOGY=16 must be chips along each axis"),
        (("manifest", "gs://b/r"), {"SPOT": "no"}, "SPOT=no must be 0 or 1"),
        (("manifest", "gs://b/r"), {"SLICES": "0"}, "SLICES=0 must be a whole number from 1"),
        (("manifest", "gs://b/r"), {"CHIPS_PER_HOST": "5"}, "CHIPS_PER_HOST=5 must divide the 16 chips"),
        (("manifest", "gs://b/r", "--a\nb"), {}, "an argument has a line break"),
        (("xpk", "gs://b/r"), {}, "give CLUSTER=...; the head of scripts/gke.sh explains it"),
        (("xpk", "gs://b/r"), {"CLUSTER": "c", "TPU_TYPE": "t", "SLICES": "-1"}, "SLICES=-1 must be a whole number"),
        (("logs",), {"NAME": ""}, "give NAME=..."),
    ],
)
def test_what_is_missing_is_named_in_one_line(arguments, changed, line):
    assert refusal(SCRIPT, *arguments, **{**SLICES, **changed}).startswith(f"error: {line}")


def test_all_words_of_the_template_are_filled():
    template = (ROOT / "scripts" / "gke_jobset.yaml").read_text()
    words = set(re.findall(r"@(\w+)@", template))
    filled = set(re.findall(r"^    fill (\w+) ", (ROOT / "scripts" / SCRIPT).read_text(), re.MULTILINE))
    assert words == filled and len(words) == 10
    printed = call(SCRIPT, "manifest", "gs://b/r", **SLICES).stdout
    assert not re.search(r"@\w+@", printed)


def test_the_image_is_for_gpus_or_tpus():
    text = (ROOT / "Dockerfile").read_text()
    stages = text.split("\nFROM ")[1:]
    assert "\nARG EXTRAS=cuda,gcs\n" in stages[-1]  # an argument is known in its stage only
    (default,), asked = re.findall(r"ARG EXTRAS=(\S+)", text), re.findall(r"--build-arg=EXTRAS=(\S+)", text)
    project = (ROOT / "pyproject.toml").read_text()
    for extra in itertools.chain(default.split(","), *(names.split(",") for names in asked)):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
