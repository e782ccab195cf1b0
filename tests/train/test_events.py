"""Files of events for TensorBoard, compared with those of tensorboardX."""

import struct
import subprocess
import sys

import numpy as np
import pytest

from gradfn.train import events


def record(**content):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = Event(wall_time=events.time.time(), **content).SerializeToString()
    length = struct.pack("<Q", len(data))
    checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checks) + data + next(checks)


@pytest.mark.filterwarnings("ignore")
def test_files_are_those_of_tensorboardx(tmp_path, monkeypatch):
    from tensorboardX.proto.event_pb2 import SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import scalar

    monkeypatch.setattr(events.time, "time", lambda: 1.7e9 + 0.25)
    values = {"loss": 0.5, "a b/ü(c)": np.float32(1.25), "/x": 1e300, "nan": np.nan, "n": -3, "tiny": 1e-46}
    rows = {128: values, 2**40: {"z": 0.0, "low": -1e39}, 2**40 + 1: {}}
    written = events.Events(tmp_path, 5)
    for step, row in rows.items():
        written.add(step, row)
    written.close()
    expected = record(file_version="brain.Event:2")
    expected += record(step=5, session_log=SessionLog(status=SessionLog.START))
    for step, row in rows.items():
        summary = Summary(value=[one for name, value in row.items() for one in scalar(name, value).value])
        expected += record(step=step, summary=summary)
    assert written.file.read_bytes() == expected


def test_training_does_not_import_other_frameworks(tmp_path):
    code = """if True:
        import sys, jax.numpy as jnp, optax, gradfn as gf
        loss = lambda params, x: ((params["w"] - x) ** 2).mean()
        gf.fit(loss, {"w": jnp.ones(2)}, jnp.ones([4, 2]), optax.sgd(0.1), 2, batch_size=2, folder=sys.argv[1])
        print({"torch", "tensorboardX", "sklearn", "matplotlib", "pandas"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stderr
