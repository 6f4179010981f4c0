"""Commands that compare with earlier results: regen, verify."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from builder import exit_codes
from builder.cli.failures import options_for
from builder.cli.options import LocalPath, PipelineOptions, json_option, pipeline_options
from builder.cli.output import hint, print_facts
from builder.errors import ConfigError
from builder.progress import Talk, plain


@click.command()
@click.argument("uid")
@pipeline_options
@json_option
@click.option("--check", is_flag=True, help="Compare it with the stored one; exit 3 if they differ.")
@click.option("--out", type=LocalPath(path_type=Path), metavar="FILE", help="Write it to this file.")
@click.option("--device", metavar="NAME", help="Device to make it on: cpu, cuda:0; the stage's first device if absent.")
def regen(
    uid: str,
    named: PipelineOptions,
    as_json: bool,
    check: bool,
    out: Path | None,
    device: str | None,
) -> None:
    """Make one generated image again, from the table alone.

    UID is the sample's uid, or SHARD:ROW. On the same device, with the same packages and batch size, it is the same
    bit for bit; if the bytes differ, the command lists what has changed.

    \b
    Example:
      builder regen 00000000:3 --check --scale large
    """
    from builder.store.files import write_atomic
    from builder.verbs.regen import regenerate

    if not check and out is None:
        raise ConfigError(
            "builder regen needs --check, --out FILE, or both", fix=f"builder regen {shlex.quote(uid)} --check"
        )
    again = regenerate(named.load(), uid, device=device)
    if out is not None:
        write_atomic(out, again.made, durable=False)
    if as_json:
        facts = {name: value for name, value in vars(again).items() if name not in ("stored", "made")}
        click.echo(json.dumps({**facts, "same": again.is_same}))
    else:
        click.echo(f"sample {plain(again.uid)}: shard {plain(again.shard)} row {again.row}")
        _show_regen(again)
        if out is not None:
            hint(f"written {out}")
    sys.exit(exit_codes.FAILED_ROWS if check and not again.is_same else exit_codes.DONE)


def _show_regen(again: Any) -> None:
    if again.is_same:
        click.echo("the same image, bit for bit")
        return
    if again.stored is None:
        click.echo("the stored image is gone")
    elif again.mean is None:
        click.echo("another image: its pixels cannot be compared")
    else:
        click.echo(f"another image: pixels differ by {again.mean:.3g} of 255 on average, {again.most} at most")
    for reason in again.reasons or ["no recorded fact differs: the model's files, the driver or the machine must"]:
        click.echo(f"  {plain(reason)}")


@click.command()
@pipeline_options
@json_option
def verify(named: PipelineOptions, as_json: bool) -> None:
    """Prove the hybrid shards against their sources.

    Exactly the selected samples differ; every other byte is the source's.

    \b
    Example:
      builder verify --scale small
    """
    from builder.hybrid.verify.proof import summary
    from builder.verbs.verify import prove

    loaded = named.load()
    proof = prove(loaded, Talk(quiet=as_json))
    if proof.shards == 0 and loaded.asked.has_hybrid_shards:
        raise ConfigError(
            "there is nothing to verify: the table has none of the pipeline's shards",
            where={"root": loaded.layout.root},
            fix=loaded.command("run"),
        )
    if as_json:
        click.echo(json.dumps(vars(proof)))
    else:
        print_facts("verify", summary(proof))
        if not loaded.asked.has_hybrid_shards:
            hint(f"sources of the kind '{loaded.asked.kind}' have no hybrid shards")
        for problem in proof.problems:
            hint(f"wrong: {plain(problem)}")
        if options := options_for(loaded, proof.problems):
            hint(options)
        for shard in proof.unread:
            hint(f"not proven, not read: {shard}")
    if proof.unread and not proof.problems:
        sys.exit(exit_codes.UNFINISHED)
    sys.exit(exit_codes.FAILED_ROWS if proof.problems else exit_codes.DONE)
