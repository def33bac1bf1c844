"""What tests run in processes of their own, which have to import it by name."""

import multiprocessing
import os
import resource
import warnings

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["bonetune.training", "bonetune.training.train", "transformers.trainer"])


def start(target, *arguments):
    """Start `target` in a process forked from one that has imported everything; the process is returned."""
    process = _SERVER.Process(target=target, args=arguments)
    process.start()
    return process


def train(settings, options):
    """`bonetune.train`; the exit code is that of the command line."""
    import torch

    import bonetune
    from bonetune.errors import Terminated

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        bonetune.train(settings, **options)
    except Terminated:
        os._exit(143)


def fill_the_disk():
    """No file of this process can be longer than a few kilobytes from now on, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def train_until_the_disk_is_full(settings, steps):
    """`bonetune.train`; from step `steps` on, no file can grow. The exit code is that of the command line."""
    import torch

    import bonetune
    from bonetune.errors import RunError

    def progress(now):
        if now.step == steps:
            fill_the_disk()

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        bonetune.train(settings, on_progress=progress)
    except RunError as error:
        os._exit(1 if "could not be written" in str(error) else 2)
    os._exit(0)
