"""What several commands are asked in the same words."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="'demo', a hub id, an alias or a folder.")]
Device = Annotated[str, typer.Option(help="Where the model is put: auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="Number type of the weights: auto, float32, float64, bfloat16 or float16.")]
