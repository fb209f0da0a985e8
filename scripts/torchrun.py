"""torchrun for the training scripts: the same options, and exit codes that tell a scheduler what to do.

    python scripts/torchrun.py --nproc-per-node 2 scripts/train_vae.py configs/generative/vae_mnist.yaml
    python scripts/torchrun.py --nnodes 2:3 --max-restarts 9 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        scripts/train_vae.py configs/generative/vae_mnist.yaml --run-dir DIR --resume auto

torchrun by itself ends with 1 whatever has happened. Here it is what the run ended with: 0 done, 75 stopped after saving (also where
torchrun itself was told to stop), 2 a mistake in what was given, 1 anything else. --help is torchrun's own; see docs/many-machines.md.
"""

import os
import sys

from lab.launch import FAILED, STOPPED

os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # or those left would seek the main process on a machine that is gone
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a lost connection the error tells, without a page of frames before it


def main() -> int:
    """Run torchrun; returns the exit code of the run."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        run.main()
    except ChildFailedError as error:
        return exit_code(error.get_first_failure()[1].exitcode)
    except SignalException:
        return STOPPED
    except RendezvousError as error:
        print(f"error: the machines of this run have lost each other ({error}); start the same command again on all", file=sys.stderr)
        return FAILED
    return 0


def exit_code(status: int) -> int:
    """A process's exit code as a shell has it; of one that a signal ended, 128 and the signal."""
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
