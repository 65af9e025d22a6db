"""Make a checkpoint of any shape with random weights: config.json and safetensors files, no tokenizer.

For measuring and testing where the real weights are not at hand. Memory stays small, whatever the size. Knows
nothing of how tprt reads a checkpoint.

    python scripts/make_checkpoint.py OUTPUT --like qwen3-8b
    python scripts/make_checkpoint.py OUTPUT --like qwen3-1.7b --no-tie --size-gib 3 --num-files 3
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

# Run as a file, this finds only scripts/ on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.checkpoint_shapes import SHAPES, Architecture, ModelShape, config_json, num_elements, tensor_shapes
from scripts.random_safetensors import ITEM_BYTES, DType, write_checkpoint
from tprt.errors import ConfigError, TprtError

_GIB = 1 << 30

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def make_checkpoint(output: Path, shape: ModelShape, dtype: DType, num_files: int, seed: int) -> None:
    """Make the folder `output`, whole or not at all.

    Raises:
        ConfigError: something is at `output` already, or there are fewer tensors than files.
        OSError: the disk is full or may not be written.
    """
    if output.exists():
        raise ConfigError(f"{output} is there already; remove it or name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the rename stays in one file system.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        text = json.dumps(config_json(shape, dtype), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        write_checkpoint(folder, tensor_shapes(shape), dtype, num_files, seed)
        folder.rename(output)


def with_size(shape: ModelShape, size_gib: float, dtype: DType) -> ModelShape:
    """Return `shape` with as many layers as come nearest to `size_gib`.

    Raises:
        ConfigError: embeddings and one layer are larger than that already.
    """
    layer, rest = (count * ITEM_BYTES[dtype] for count in num_elements(shape))
    num_layers = round((size_gib * _GIB - rest) / layer)
    if num_layers < 1:
        raise ConfigError(
            f"--size-gib {size_gib:g}: embeddings and one layer of this shape take {(rest + layer) / _GIB:.2f}"
            " GiB; give more, or a smaller --vocab-size or --hidden-size"
        )
    return replace(shape, num_hidden_layers=num_layers)


@app.command()
def command(  # noqa: PLR0913 - one parameter for each option
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    like: Annotated[
        str, typer.Option(help=f"Take every setting that is not given from one of {', '.join(SHAPES)}.")
    ] = "qwen3-0.6b",
    architecture: Annotated[Architecture | None, typer.Option(help="As in config.json.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="As in config.json.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="As in config.json.")] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(help="As in config.json.")] = None,
    num_attention_heads: Annotated[int | None, typer.Option(help="As in config.json.")] = None,
    num_key_value_heads: Annotated[int | None, typer.Option(help="As in config.json.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="As in config.json.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="As in config.json.")] = None,
    tie: Annotated[bool | None, typer.Option("--tie/--no-tie", help="One matrix for both embeddings.")] = None,
    bias: Annotated[
        bool | None, typer.Option("--bias/--no-bias", help="Biases, where the code has any.")
    ] = None,
    size_gib: Annotated[float | None, typer.Option(help="Take as many layers as give about this size.")] = None,
    dtype: Annotated[DType, typer.Option(help="Of every tensor.")] = "bfloat16",
    num_files: Annotated[int, typer.Option(help="Files, of about equal size.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.", min=0)] = 0,
) -> None:
    """Make a checkpoint with random weights in the folder OUTPUT."""
    given: dict[str, Any] = {
        "architecture": architecture,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tie,
        "bias": bias,
    }
    if like not in SHAPES:
        raise ConfigError(f"--like {like}: expected one of {', '.join(SHAPES)}")
    shape = replace(SHAPES[like], **{name: value for name, value in given.items() if value is not None})
    if size_gib is not None:
        if num_hidden_layers is not None:
            raise ConfigError("--size-gib chooses the number of layers; leave --num-hidden-layers out")
        shape = with_size(shape, size_gib, dtype)
    make_checkpoint(output, shape, dtype, num_files, seed)
    num_bytes = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(f"wrote {output}: {shape.num_hidden_layers} layers, {num_bytes / _GIB:.2f} GiB in {num_files} files")


def main() -> int:
    """Run the command line."""
    try:
        app()
    except (TprtError, OSError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
