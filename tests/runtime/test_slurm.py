"""docs/slurm.sbatch, run for real: only SLURM's own commands are stand-ins, which start the work on this machine."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.runs import ROOT

STAND_INS = {
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> scontrol.txt; fi',
    "torchrun": f'exec "{sys.executable}" -m torch.distributed.run --master_addr=127.0.0.1 "$@"',
}


@pytest.mark.slow
def test_the_batch_script_saves_and_queues_again_when_its_time_is_up_and_then_finishes(run):
    run.folder.mkdir(exist_ok=True)
    for name, line in STAND_INS.items():
        path = run.folder / name
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    preamble = f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    (run.folder / "train.py").write_text(preamble + f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    job_id = str(os.getpid())  # the port follows from it
    slurm = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": job_id, "SLURM_JOB_NODELIST": "localhost"}
    environment = os.environ | slurm | {"PATH": f"{run.folder}:{os.environ['PATH']}"}

    def submit(output, epochs: int) -> subprocess.Popen:
        words = ["bash", str(ROOT / "docs" / "slurm.sbatch"), *run.flags(EPOCHS=epochs, LOG_EVERY=100)]
        return subprocess.Popen(words, cwd=run.folder, env=environment, stdout=output, stderr=subprocess.STDOUT)

    with open(run.folder / "job.txt", "w+") as output:
        job = submit(output, 100_000)
        end = time.monotonic() + 60
        while "epoch 2" not in (run.folder / "job.txt").read_text():
            assert time.monotonic() < end and job.poll() is None, (run.folder / "job.txt").read_text()
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 0
        text = (run.folder / "job.txt").read_text()
        assert "Stopped after step" in text
        assert (run.folder / "scontrol.txt").read_text() == f"requeue {job_id}\n"
        step = run.state()["step"]
        assert step >= 20, "epoch 2 had been reported"

        epochs = step // 10 + 2
        assert submit(output, epochs).wait(60) == 0
        assert f"going on after step {step:,}" in (run.folder / "job.txt").read_text()
        assert run.state()["step"] == epochs * 10
        assert (run.folder / "scontrol.txt").read_text() == f"requeue {job_id}\n", "a finished job was queued again"
