"""Where a training is reported, and where its adapter is pushed."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import RunStopped, UserError, first_line, option


@dataclass
class ReportArguments:
    """Trackers and the hub; metrics.jsonl is always written."""

    report_to: list[str] = option(
        ["tensorboard"], "trackers that accelerate knows: tensorboard, wandb, trackio, mlflow and others; none"
    )
    push_to_hub: str | None = option(
        None, "push adapter/ with its card to this repository of the hub at the end, such as me/my-adapter"
    )


def check_reporting(args: Any) -> None:
    """Raises a UserError where a tracker is not known or not installed, or where the hub cannot be pushed to."""
    if args.report_to != ["none"]:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known = sorted(LOGGER_TYPE_TO_CLASS)
        here = sorted(str(name) for name in get_available_trackers())
        for name in args.report_to:
            if name == "none":
                raise UserError("--report-to none cannot be combined with a tracker")
            if name not in known:
                raise UserError(f"unknown --report-to {name!r}: one of none, {', '.join(known)}")
            if name not in here:
                there = ", ".join(["none", *here])
                raise UserError(f"--report-to {name}: its package is not installed or not set up; these are: {there}")
    if args.push_to_hub is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    if args.method == "full":
        raise UserError("--push-to-hub pushes an adapter, and --method full has none: upload merged/ by hand")
    try:
        validate_repo_id(args.push_to_hub)
    except ValueError as error:
        raise UserError(f"--push-to-hub: {first_line(error)}") from error
    if get_token() is None:
        raise UserError("--push-to-hub needs a token of the hub: type `hf auth login`, or set HF_TOKEN")


def start_trackers(args: Any) -> list[Any]:
    """Accelerate's trackers of --report-to, each told of this run's options; tensorboard's files go to --output-dir."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    values = {name: value for name, value in dataclasses.asdict(args).items() if value is not None}
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}
    trackers = []
    for name in args.report_to:
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = (args.output_dir,) if kind.requires_logging_directory else ()
        tracker = kind("tensorboard" if name == "tensorboard" else "ba-lora", *folder)
        tracker.start()
        if name != "tensorboard":  # tensorboard would store the options as a second run
            tracker.store_init_configuration(plain)
        trackers.append(tracker)
    return trackers


def push_adapter(args: Any) -> None:
    """Pushes adapter/ to the repository of --push-to-hub, from the first process; its README.md is the model card.

    Raises:
        RunStopped: the push failed; the run is complete all the same.
    """
    if args.push_to_hub is None or int(os.environ.get("RANK", "0")) != 0:
        return
    from huggingface_hub import HfApi

    folder = Path(args.output_dir) / "adapter"
    try:
        api = HfApi()
        api.create_repo(args.push_to_hub, private=True, exist_ok=True)
        api.upload_folder(repo_id=args.push_to_hub, folder_path=folder, commit_message=f"{args.method} adapter")
    except Exception as error:  # the hub's client raises dozens of kinds
        raise RunStopped(
            f"could not push to {args.push_to_hub} ({first_line(error)}); the run is complete in {args.output_dir}: "
            f"the same command with --resume pushes again, and so does hf upload {args.push_to_hub} {folder}"
        ) from error
    print(f"pushed {folder} to {args.push_to_hub}")
