"""`bonetune merge`: adapters and their base model become one model, which is proven to be the adapted one before it counts."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bonetune.certificates import Certificate, LayersCertificate, Witness, certify, hashes, prompts_of, record
from bonetune.errors import InputError, RunError, first_line
from bonetune.files import CERTIFICATE_FILE, read_run, write_json
from bonetune.formats import read_adapter
from bonetune.formats.checkpoint import Checkpoint
from bonetune.formats.pth_checkpoint import PthCheckpoint
from bonetune.formats.tensors import ADAPTER_CONFIG, sha256
from bonetune.merging.checked import Checks
from bonetune.merging.companions import write_companions
from bonetune.merging.guards import (
    Options,
    base_of,
    check_base,
    check_output,
    check_pth,
    check_replaced,
    checked_options,
    hashes_of,
    pth_of,
)
from bonetune.merging.memory import Adapted, NotBuilt
from bonetune.merging.plan import NotStreamed, Plan, make_plan, read_states
from bonetune.merging.pth import merge_pth
from bonetune.merging.staging import JOURNAL, Staging
from bonetune.merging.streamed import stream
from bonetune.models import load_base, parse_dtype, task_type_of
from bonetune.rwkv import from_pth
from bonetune.rwkv.weights import is_pth

# `auto` compares logits where the model's weights take no more than this part of the memory that is free.
_COMFORTABLE = 0.4
# For what stands beside the weights: tokenizer, configurations.
_COMPANIONS_BYTES = 64 << 20
Proven = Certificate | LayersCertificate


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model lies, and how it compares.

    Args:
        output: its folder.
        certificate: that it is the adapted model.
        into: `trained` or `original`, for an adapter that was trained on quantized weights; else None.
        other: what the other one of these two is, compared with the adapted model; None without `into`, or layer by layer.
        in_memory: why the model was merged in memory; None if its files were merged one by one.
    """

    output: str
    certificate: Proven
    into: str | None = None
    other: Certificate | None = None
    in_memory: str | None = None


def merge(
    adapter: str | Sequence[str],
    output: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    scale: float | Sequence[float] = 1.0,
    into: str = "trained",
    certify: str = "auto",
    tolerance: float | None = None,
    any_base: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> MergeResult:
    """Merge adapters into their base model and write the result, with its certificate, to a folder.

    The updates are added in float32, each one's from the frozen weights, and rounded once. The base model's files are read,
    changed and written one by one, a few rows at a time; a merge that was interrupted goes on with the files that are missing
    when it is called again. What that cannot do (adapters of other methods, experts that are stored otherwise than the model
    has them, quantized weights, classifiers) is merged in memory. The folder appears only if the merged model, as it was
    written, is the adapted one; otherwise it is kept aside as `output`.rejected. The certificate is left beside the adapters,
    too.

    Args:
        adapter: folder of the adapter, or of several for one base model and task, whose updates add up. The tokenizer and its
            chat template are the first one's.
        output: folder to write.
        base: base model, if it is not where the adapter says. Into an RWKV `.pth`, `output` is a file of that kind.
        dtype: of the merged weights; `auto` keeps the base's.
        scale: factor of the update, for all adapters or for each; 1 is what was trained.
        into: for an adapter trained on quantized weights: `trained` merges into the values that those stood for, so that the
            merged model is the one that was trained; `original` into the weights from before they were quantized, to which
            the adapter was never fitted. The result tells how far the other one is from the trained model.
        certify: `logits` compares what the two models say after the adapter's training prompts (prompts.jsonl beside it; else
            after general ones), each loaded in its turn; `layers` compares each written weight with what training computes,
            on random inputs, and needs no model in memory; `auto` is `logits` where the weights take less than 40% of the
            memory that is free, and PEFT can make the adapted model.
        tolerance: by how much outputs may differ, relative to their size; None is what rounding explains.
        any_base: merge into a base model that is not the one that was trained on, or that holds the adapter already.
        overwrite: replace the merged model that `output` holds.
        trust_remote_code: run code that comes with the base model or the adapters. That a training run did does not allow it.

    Raises:
        InputError: adapter or base model that cannot be loaded, or are not for each other; output that exists, or lies in what
            is merged; not enough space on the disk; scale of a method without scaling; adapters for different tasks; code that
            is not trusted.
        AdapterFileError: tensors that do not fit the base model, or are not finite.
        RunError: the merged model is not the adapted one, or could not be written.

    Example:
        >>> bonetune.merge("runs/first", "merged").certificate.holds
    """
    base = base or pth_of([adapter] if isinstance(adapter, str) else adapter)
    options = checked_options(adapter, output, base, dtype, scale, into, certify, tolerance, overwrite, trust_remote_code)
    if base and is_pth(base):
        return _into_pth(options, any_base=any_base)
    check_output(options)
    base_name, checkpoint = base_of(options)
    if checkpoint is not None and not any_base:
        check_base(options.adapters, checkpoint)
    prompts = list(dict.fromkeys(prompt for path in options.adapters for prompt in prompts_of(Path(path))))
    adapted = Adapted(options.adapters, base, options.scales, dtype, into, prompts, trust_remote_code=trust_remote_code)
    try:
        if adapted.quantized and into == "trained":
            raise NotStreamed("the weights that were trained on were quantized")
        if base_name is None:
            raise NotStreamed("no base model is named")
        target = parse_dtype(dtype)
        target = None if isinstance(target, str) else target
        states = read_states(options.adapters)
        plan = make_plan(states, base_name, options.scales, target, trust_remote_code=trust_remote_code)
    except NotStreamed as reason:
        if certify == "layers":
            raise InputError(
                f"--certify layers compares what is merged file by file, and this is not, because {reason}: use logits."
            ) from reason
        return _in_memory(options, adapted, checkpoint, str(reason))
    return _file_by_file(options, adapted, plan)


def _into_pth(options: Options, *, any_base: bool) -> MergeResult:
    """Merge into an RWKV model, which is one file; its certificate is put beside it, and beside adapters that are folders."""
    base = Path(str(options.base))
    if not base.is_file():
        raise InputError(f"There is no base model {base}: pass --base FILE.")
    if options.overwrite and options.output.suffix == ".pth":
        check_replaced(options.output)
    checkpoint = PthCheckpoint(base)
    if not any_base:
        check_pth(options.adapters, checkpoint)
    folders = [path for path in options.adapters if (Path(path) / ADAPTER_CONFIG).is_file()]
    quantized = any(read_run(Path(path)).get("quantization") is not None for path in folders)
    if quantized and options.into == "trained":
        raise InputError(
            f"{options.adapters[0]} was trained on quantized weights, and a .pth is merged from its own: pass --into original, "
            "and see how far that is from what was trained by --certify logits."
        )
    says = options.certify == "logits"
    if says and len(folders) < len(options.adapters):
        raise InputError("Without a tokenizer beside each adapter there is nothing to ask the model: use --certify layers.")
    states = [read_adapter(Path(path)) for path in options.adapters]
    compare = _comparison(options, folders) if says else None
    proofs = merge_pth(
        states,
        base,
        options.output,
        scale=options.scales,
        dtype=options.dtype,
        overwrite=options.overwrite,
        tolerance=None if says else options.tolerance,
        compare=compare,
    )
    content = record(
        proofs,
        {options.output.name: sha256(options.output)},
        base_fingerprint=checkpoint.fingerprint,
        adapters=[state.source.files for state in states],
    )
    write_json(options.output.with_name(f"{options.output.name}.{CERTIFICATE_FILE}"), content)
    _leave_beside(folders, content, options.output)
    return MergeResult(str(options.output), proofs, options.into if quantized else None)


def _comparison(options: Options, folders: list[str]) -> Callable[[Path], Certificate]:
    """From a written file to how its model compares with the adapted one, which is loaded here: before anything is written."""
    prompts = list(dict.fromkeys(prompt for path in folders for prompt in prompts_of(Path(path))))
    trusted = {"trust_remote_code": options.trust_remote_code}
    adapted = Adapted(folders, options.base, options.scales, options.dtype, options.into, prompts, **trusted)
    expected = adapted.witness()
    return lambda written: certify(from_pth(written, "auto"), expected, options.tolerance)


def _in_memory(options: Options, adapted: Adapted, checkpoint: Checkpoint | None, reason: str) -> MergeResult:
    staging = Staging(options.output, {"in memory": os.getpid()}, overwrite=options.overwrite)
    try:
        with staging.saying_what_is_full():
            expected, task_type = adapted.save_merged(
                staging.folder, options.dtype, lambda weights: staging.check_space(weights + _COMPANIONS_BYTES)
            )
        model = load_base(str(staging.folder), task_type=task_type, trust_remote_code=adapted.trusted).model
        certificate = certify(model, expected, options.tolerance)
        del model
        other = None
        if adapted.quantized and certificate.holds:
            other = adapted.other_choice(str(staging.folder), task_type, expected)
        files = hashes(staging.folder)
        _deliver(options, staging, certificate, files, None if checkpoint is None else checkpoint.fingerprint)
    except BaseException:
        staging.remove()
        raise
    into = options.into if adapted.quantized else None
    return MergeResult(str(options.output), certificate, into, other, reason)


def _file_by_file(options: Options, adapted: Adapted, plan: Plan) -> MergeResult:
    weights = sum(plan.bytes_of(file) for file in plan.files)
    # before the merge: a model that cannot be loaded should be known by then
    expected = _expected(options, adapted, plan)
    staging = Staging(options.output, plan.identity, overwrite=options.overwrite)
    try:
        staging.check_space(weights + _COMPANIONS_BYTES)
        checks = Checks(plan, staging.folder)
        with staging.saying_what_is_full():
            stream(plan, staging, checks.jobs if expected is None else lambda file: [])
            write_companions(plan, staging.folder, trust_remote_code=options.trust_remote_code)
        task_type = task_type_of(options.adapters[0])
        other = None
        if expected is None:
            certificate: Proven = checks.certificate(options.tolerance)
        else:
            model = load_base(str(staging.folder), task_type=task_type, trust_remote_code=adapted.trusted).model
            certificate = certify(model, expected, options.tolerance)
            del model
            if adapted.quantized and certificate.holds:
                other = adapted.other_choice(str(staging.folder), task_type, expected)
        known = {name: entry["sha256"] for name, entry in staging.finished.items()}
        _deliver(options, staging, certificate, hashes(staging.folder, known), plan.checkpoint.fingerprint)
    finally:
        staging.close()
    return MergeResult(str(options.output), certificate, options.into if adapted.quantized else None, other)


def _expected(options: Options, adapted: Adapted, plan: Plan) -> Witness | None:
    """What the adapted model says; None if the merge is to be compared layer by layer."""
    if options.certify == "layers" or (options.certify == "auto" and not _fits_in_memory(plan)):
        return None
    try:
        return adapted.witness()
    except NotBuilt as error:
        if options.certify == "auto":
            return None
        raise InputError(f"{error} What it says cannot be compared: use --certify layers.") from error


def _deliver(options: Options, staging: Staging, certificate: Proven, files: dict[str, str], fingerprint: str | None) -> None:
    """Put the merged model in its place if the certificate holds, else aside."""
    files.pop(JOURNAL, None)
    content = record(
        certificate, files, base_fingerprint=fingerprint, adapters=[hashes_of(Path(path)) for path in options.adapters]
    )
    with staging.saying_what_is_full():
        write_json(staging.folder / CERTIFICATE_FILE, content)
    if not certificate.holds:
        aside = staging.reject(options.sources)
        raise RunError(
            f"The merged model is not the adapted one, so {options.output} was not written; it is kept as {aside}. It is "
            f"{certificate}."
        )
    staging.publish()
    _leave_beside(options.adapters, content, options.output)


def _leave_beside(adapters: Sequence[str], content: dict[str, Any], output: Path) -> None:
    """Write the certificate of a merge beside the adapters, too."""
    content = {name: value for name, value in content.items() if name != "files"}  # which are not the adapter's
    for adapter in adapters:
        if os.access(adapter, os.W_OK):
            try:
                write_json(Path(adapter) / CERTIFICATE_FILE, content)
            except OSError as error:
                raise RunError(
                    f"{output} is written and certified, but {adapter} could not take the certificate: {first_line(error)}."
                ) from error


def _fits_in_memory(plan: Plan) -> bool:
    import psutil

    return sum(plan.bytes_of(file) for file in plan.files) < _COMFORTABLE * psutil.virtual_memory().available
