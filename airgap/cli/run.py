"""`airgap run`: one task on the installed model, from typed input to tables and a report."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, root_folder, show, stderr
from policy.errors import UsageError

if TYPE_CHECKING:
    from airgap.serve import Answer, Broker, Job

INPUT_LIMIT = 12 * 1024 * 1024  # bytes of one input file


SYSTEM_SOCKET = Path("/run/airgap-broker.sock")  # as packaging/systemd/airgap.socket has it


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="run")(run)


def run(
    task: Annotated[
        str, typer.Argument(help="retrosynthesis, molecule, binding-site, pocket-ligand, material")
    ],
    *,
    smiles: Annotated[str, typer.Option(help="A molecule as SMILES.")] = "",
    fasta: Annotated[Path | None, typer.Option(help="A FASTA file; `-` reads it here.")] = None,
    sequence: Annotated[str, typer.Option(help="A protein, one letter a residue.")] = "",
    pdb: Annotated[Path | None, typer.Option(help="A structure, PDB or mmCIF.")] = None,
    chain: Annotated[str, typer.Option(help="Chain of the structure.")] = "",
    ligand: Annotated[str, typer.Option(help="Ligand that marks the pocket, such as STI.")] = "",
    residues: Annotated[str, typer.Option(help="Pocket residues, such as 12,45-48.")] = "",
    region: Annotated[str, typer.Option(help="Part of the protein, such as 1-120.")] = "",
    record: Annotated[int | None, typer.Option(help="Record of the FASTA file, from 1.")] = None,
    level: Annotated[
        int | None,
        typer.Option(help="Pocket in the prompt: 1 unmarked, 2 as letters, 3 as SMILES."),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Expert: a tagged prompt, checked like all others.")
    ] = "",
    fix: Annotated[
        bool, typer.Option("--fix", help="Apply the fix that a refusal offered, and note it.")
    ] = False,
    n: Annotated[int | None, typer.Option("-n", "--samples", help="Samples.")] = None,
    preset: Annotated[
        str,
        typer.Option(help="Settings: ours (default), authors-readme or authors-script of LOGOS."),
    ] = "",
    temperature: Annotated[float | None, typer.Option(help="0.01 to 10.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus, up to 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 switches it off.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 switches it off.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Budget of one sample.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    valence: Annotated[
        bool,
        typer.Option("--valence", help="Force valid molecules; labelled, never the default."),
    ] = False,
    ppl_authors: Annotated[
        bool, typer.Option("--ppl-authors", help="Also the perplexity of the authors' scripts.")
    ] = False,
    project: Annotated[str, typer.Option(help="Project of site.toml that this is for.")] = "",
    model: Annotated[str, typer.Option(help="Installed bundle; default the current one.")] = "",
    provider: Annotated[
        str, typer.Option(help="cpu, cuda or tensorrt: a demand; default that of site.toml.")
    ] = "",
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV.")] = None,
    sdf: Annotated[Path | None, typer.Option(help="Write the molecules as SDF.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report with drawings.")] = None,
    receipt: Annotated[Path | None, typer.Option(help="Write the receipt (tlog-proof).")] = None,
    socket: Annotated[
        Path | None,
        typer.Option(
            help="Ask the daemon there; default [service] socket of site.toml, if any, and for who "
            "has no tree of the own that of the system.",
            readable=False,
        ),
    ] = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Run TASK on the installed model, sealed, decided by policy, and on record."""
    given = {
        "smiles": smiles,
        "fasta": read_text(fasta, "--fasta"),
        "sequence": sequence,
        "pdb": read_text(pdb, "--pdb"),
        "chain": chain,
        "ligand": ligand,
        "residues": residues,
        "region": region,
        "record": record,
        "level": level,
        "prompt": prompt,
        "fix": fix or None,
    }
    options = {
        "n": n,
        "preset": preset,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "valence": valence or None,
        "ppl_authors": ppl_authors or None,
    }
    outputs = {"csv": csv, "sdf": sdf, "html": html, "receipt": receipt}
    from airgap.science.tasks import find_task
    from airgap.serve import Job, check_outputs, open_broker, present

    name = find_task(task).name  # an unknown task is told before anything starts
    check_outputs(name, outputs)
    daemon = socket or daemon_of(root)
    if daemon is not None:
        if model or valence or provider:
            raise UsageError(
                "usage.argument",
                "the administrator of the daemon chooses --model, --valence and --provider",
                hint="leave them out",
            )
        from airgap.service.client import run as run_there

        job = Job(name, given_only(given), project, given_only(options))
        with progress_bar() as tell:
            presented = run_there(daemon, job, outputs, tell)
        show(presented.json, presented.text, json=json)
        return
    with open_broker(
        root_folder(root), model=model, project=project, valence=valence, provider=provider
    ) as opened:
        broker, chosen = opened
        job = Job(name, given_only(given), chosen, given_only(options))
        answer = infer_with_progress(broker, job)
        presented = present(broker, job, answer, outputs)
    show(presented.json, presented.text, json=json)


def given_only(values: dict[str, Any]) -> dict[str, Any]:
    """Return what was given on the command line: no empty text, no None."""
    return {key: value for key, value in values.items() if value not in (None, "")}


def read_text(path: Path | None, option: str) -> str:
    """Return the text of an input file (`-` is standard input), at most `INPUT_LIMIT` bytes."""
    if path is None:
        return ""
    if str(path) == "-":
        raw = sys.stdin.buffer.read(INPUT_LIMIT + 1)
    else:
        try:
            with path.open("rb") as stream:
                raw = stream.read(INPUT_LIMIT + 1)
        except OSError as error:
            raise UsageError(
                "usage.argument",
                f"{option}: {path} cannot be read ({error.strerror})",
                hint="check the path",
            ) from error
    if len(raw) > INPUT_LIMIT:
        raise UsageError(
            "usage.argument",
            f"{option}: more than {INPUT_LIMIT} bytes",
            hint="cut the file down to the chain or record in question",
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            "usage.argument",
            f"{option}: byte {error.start} is not UTF-8 text",
            hint="give a plain text file, not a compressed or binary one",
        ) from error
    if not text.strip():
        raise UsageError("usage.argument", f"{option}: {path} is empty", hint="check the path")
    return text


def daemon_of(root: Path | None) -> Path | None:
    """Return the socket of the daemon that site.toml names, None where it names none.

    Who has no tree and names none asks the daemon of the system, where there is one.
    """
    from airgap.config import FILE_NAME, load_site

    tree = root_folder(root)
    if not (tree / FILE_NAME).is_file():
        return SYSTEM_SOCKET if root is None and SYSTEM_SOCKET.exists() else None
    named = load_site(tree).service.socket
    return Path(named) if named else None


def infer_with_progress(broker: Broker, job: Job) -> Answer:
    """Run the job with a bar on standard error: samples done, tokens, time."""
    with progress_bar() as tell:
        return broker.infer(job, tell)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int, int], None]]:
    """Show a bar on standard error; yields who is to be told of tokens, samples done and wanted."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    shown = stderr.is_terminal  # else an empty line would be left of the bar
    with Progress(*columns, console=stderr, transient=True, disable=not shown) as progress:
        bar = progress.add_task("decoding", total=None, state="")

        def tell(tokens: int, finished: int, n: int) -> None:
            state = f"{finished}/{n} samples, {tokens} tokens"
            progress.update(bar, completed=finished, total=n, state=state)

        yield tell
