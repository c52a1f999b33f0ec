"""``mllm-efficient choose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import MllmEfficientError
from . import options


def choose(
    data: Annotated[Path | None, typer.Option("--data", help="The requests that the run was asked, a JSON object a line.")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="The folder of a finished eval --data or sweep --data.")] = None,
    budget: Annotated[int | None, typer.Option("--budget", min=2, help="How many requests you can label; 50.")] = None,
    explore: Annotated[
        float | None,
        typer.Option("--explore", min=0, max=1, help="Share of the budget that is drawn evenly, 0.2; 0: differences alone, no accuracies."),
    ] = None,
    labelled: Annotated[
        Path | None, typer.Option("--labelled", help="Instead: a file that choose wrote, its answers filled in; says what follows.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="The file to write, a record a line with an empty answer.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of what is drawn; 0.")] = None,
    json: options.Json = False,
) -> None:
    """Which of your requests to label, so that few labels say most about what methods cost in accuracy; and what the labels say."""
    if labelled is not None:
        for name, value in (
            ("--data", data), ("--run", run), ("--output", output), ("--budget", budget), ("--explore", explore), ("--seed", seed),
        ):  # fmt: skip
            if value is not None:
                raise MllmEfficientError(f"{name} has no effect with --labelled: leave it out")
        from ..eval import choosing

        rows = choosing.estimates(labelled)
        if json:
            options.print_json(rows, {"labelled": str(labelled)})
            return
        print(f"{rows[0]['labels']} labels stand for {rows[0]['requests']} requests; points, 95% intervals")
        options.print_table(
            ["method", "right", "vs baseline"], [[r["method"], *(_cell(r, n) for n in ("accuracy", "difference"))] for r in rows], left=1
        )
        return
    if data is None or run is None:
        raise MllmEfficientError("choose needs --data and --run, or --labelled")
    from ..eval import choosing
    from ..records import read
    from ..writing import write_text

    budget, seed = 50 if budget is None else budget, 0 if seed is None else seed
    explore = choosing.EXPLORE if explore is None else explore
    arms, requests, answered = choosing.read_run(run, [record.id for record in read(data)])
    if not requests:
        raise MllmEfficientError(f"{data}: every request with an image has an answer already, so there is nothing to label")
    lines = choosing.chosen_lines(requests, arms, budget, explore, seed)
    differing = sum(any(r.differ) for r in requests)
    also = f", {answered} with an answer left out" if answered else ""
    options.say(f"{len(lines)} of {len(requests)} requests{also}; {differing} are answered differently by some method")
    if output is not None:
        write_text(output, choosing.text_of(lines))
        options.say(f"wrote {output}: fill in answer, then mllm-efficient choose --labelled {output}")
    if json:
        options.print_json(lines, {"data": str(data), "run": str(run), "arms": arms, "budget": budget, "explore": explore, "seed": seed})
    elif output is None:
        options.print_table(["id", "probability"], [[line["id"], f"{line['probability']:.3f}"] for line in lines], left=1)


def _cell(row: dict, name: str) -> str:
    if row[name] is None:
        return "-"
    bounds = row[f"{name}_interval"]
    return f"{row[name]:.1f}" + ("" if bounds is None else f" [{bounds[0]:.1f}, {bounds[1]:.1f}]")
