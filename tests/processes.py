"""What tests run in processes of their own, which have to import it by name."""

import multiprocessing
import os
import resource
import signal
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


def merge_until_killed(adapter, output, writes, options):
    """`bonetune.merge`, file by file; the process is killed at the so-many-th write of rows."""
    import torch

    import bonetune
    from bonetune.merging import streamed

    put, left = streamed._Writer._put, iter(range(writes - 1, -1, -1))

    def put_or_die(*arguments):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        put(*arguments)

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    streamed._Writer._put = put_or_die
    bonetune.merge(adapter, output, **options)


def merge_until_the_disk_is_full(adapter, output):
    """`bonetune.merge`; once a file is finished, no other can grow. The exit code is that of the command line."""
    import torch

    import bonetune
    from bonetune.errors import RunError
    from bonetune.merging.staging import Staging

    finish = Staging.finish

    def finish_and_fill(*arguments):
        finish(*arguments)
        fill_the_disk()

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Staging.finish = finish_and_fill
    try:
        bonetune.merge(adapter, output, certify="layers")
    except RunError as error:
        os._exit(1 if "were needed, and the disk has" in str(error) else 2)
    os._exit(0)


def merge_when_the_disk_is_full(adapter, output):
    """`bonetune.merge` of an adapter of another method, whose model cannot be written."""
    import torch

    import bonetune
    from bonetune.errors import RunError
    from bonetune.merging.staging import Staging

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Staging.check_space = lambda self, needed: fill_the_disk()
    try:
        bonetune.merge(adapter, output)
    except RunError as error:
        os._exit(1 if "were needed, and the disk has" in str(error) else 2)
    os._exit(0)
