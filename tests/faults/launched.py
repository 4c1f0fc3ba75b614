"""The trainer for torchrun, whose rank 1 is killed in its first life and hangs in its second."""

import os
import signal
import sys

import runs
from torchtitan_mtp.models.flavors import flavors
from torchtitan_mtp.train import main
from torchtitan_mtp.trainer import Trainer

FAULTS = {0: (4, signal.SIGKILL), 1: (6, signal.SIGSTOP)}  # life -> before which step, what

if __name__ == "__main__":
    flavors["llama3"]["tiny"] = runs.TINY
    step, (at, number) = Trainer.train_step, FAULTS[int(os.environ["TORCHELASTIC_RESTART_COUNT"])]

    def fault_then_step(self: Trainer) -> None:
        if self.world.rank == 1 and self.state.step + 1 == at:
            self.checkpointer.wait()
            print(f"fault {number.value} in process {os.getpid()}", flush=True)
            os.kill(os.getpid(), number)
        step(self)

    Trainer.train_step = fault_then_step
    status = main()
    sys.stderr.flush()
    os._exit(status)
