"""The same steps on a cluster of two nodes: Ray's own test utility, a process for each node."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_release
import pytest
from fake_release import PROGRAM, fake_step, graph, run

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.release.schedule import Schedule, State
from trtllm_thoughtx.release.store import Store

MIB = 1 << 20
NODE = {"num_cpus": 1, "memory": 600 * MIB, "object_store_memory": 80 * MIB}


def test_nothing_of_ray_is_imported_unless_asked_for():
    probe = "import sys, trtllm_thoughtx.release.job, trtllm_thoughtx.cli.release\nsys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def test_without_ray_it_says_how_to_have_it(tmp_path, monkeypatch):
    from trtllm_thoughtx.release.on_ray import RayExecutor

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ThoughtxError) as refused:
        RayExecutor(Store(tmp_path), "local")
    assert refused.value.code == "E201" and "[ray]" in refused.value.fix


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason='Ray is not installed: pip install "trtllm-thoughtx[ray]"')
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(initialize_head=True, head_node_args=NODE)
    made.gpu_node = made.add_node(**NODE, resources={"fake_gpu": 1})
    yield made
    made.shutdown()


@pytest.fixture
def executor(cluster, tmp_path):
    import ray

    from trtllm_thoughtx.release.on_ray import RayExecutor

    (tmp_path / "store").mkdir()
    made = RayExecutor(Store(tmp_path / "store"), cluster.address, program=PROGRAM)
    yield made
    made.close()
    ray.shutdown()


def pids(note: Path) -> list[int]:
    return [int(line.split()[2]) for line in note.read_text().splitlines()] if note.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(ready) -> None:
    while not ready():
        time.sleep(0.02)


pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.slow
def test_the_bytes_are_those_of_local_processes(executor, tmp_path):
    """With steps that only one of the nodes can make."""
    special = fake_step(tmp_path / "note", "build", "special", resources=(("fake_gpu", 1.0),))
    steps = graph(tmp_path / "note", 2, 2) | {special.key: special}
    there = run(steps, tmp_path / "store", executor)
    here = run(steps, tmp_path / "local")
    assert {state.status for state in (*there.values(), *here.values())} == {"made"}
    kept = [{path.parts[-3]: path.read_bytes() for path in (tmp_path / name / "objects").glob("*/*/*/data")} for name in ("store", "local")]
    assert kept[0] == kept[1] and len(kept[0]) == 6


@pytest.mark.slow
def test_what_no_node_has_is_said_soon_with_what_there_is(executor, tmp_path):
    big = fake_step(tmp_path / "note", "build", "big", memory=700 * MIB)
    odd = fake_step(tmp_path / "note", "build", "odd", gpu="H999")
    good = fake_step(tmp_path / "note", "build", "good")
    states = run({step.key: step for step in (big, odd, good)}, tmp_path / "store", executor)
    assert states[good.key].status == "made" and states[big.key].status == states[odd.key].status == "skipped"
    assert (
        "no node of the cluster has CPU 1, memory 700.0 MiB; it has CPU 1, fake_gpu 1, memory 600.0 MiB; CPU 1, memory 600.0 MiB"
        in states[big.key].reason
    )
    assert "accelerator_type:H999" in states[odd.key].reason and "fake_gpu 1" in states[odd.key].reason


@pytest.mark.slow
def test_cancel_leaves_no_process(executor, tmp_path):
    note, root = tmp_path / "note", tmp_path / "store"
    steps = graph(note, 2, 1, ["--until", str(tmp_path / "never")])

    class Interrupted(fake_release.Silent):
        def tick(self):
            if len(pids(note)) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Schedule(steps, Store(root), executor, Interrupted()).run()
    assert not any(map(is_alive, pids(note)))
    assert list((root / "objects").glob("*/*")) == list((root / "partial").iterdir()) == []


@pytest.mark.slow
def test_a_node_that_joins_late_and_one_that_goes(cluster, executor, tmp_path):
    """A step waits for the kind of node that it needs; when that one goes in mid-build, it is made on the next."""
    note, go = tmp_path / "note", tmp_path / "go"
    step = fake_step(note, "build", "late", words=["--until", str(go)], resources=(("late_gpu", 1.0),))
    states: dict[str, State] = {}
    working = threading.Thread(target=lambda: states.update(run({step.key: step}, tmp_path / "store", executor)))
    working.start()  # nodes are added in the main thread alone
    node = cluster.add_node(**NODE, resources={"late_gpu": 1})
    wait_for(lambda: len(pids(note)) == 1)
    cluster.remove_node(node, allow_graceful=False)
    wait_for(lambda: not is_alive(pids(note)[0]))
    go.touch()
    node = cluster.add_node(**NODE, resources={"late_gpu": 1})
    working.join()
    cluster.remove_node(node)
    assert (states[step.key].status, states[step.key].tries) == ("made", 1)
    assert not any(map(is_alive, pids(note)))
