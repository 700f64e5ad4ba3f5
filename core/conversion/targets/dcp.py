"""--to dcp: what a torch file of the model would hold, as the items of a DCP folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from ...containers.dcp import writer as dcp_writer
from ...containers.dcp.metadata import METADATA
from ...containers.dcp.writer import WrittenItem
from ...containers.torch_files.layout import Sink, TensorRecord
from ..plan import Options, Plan, Ref, Source, Target, WeightFile
from .torch import plan_pt


def in_dcp(plan: Plan) -> Plan:
    """Plan the folder of a torch file's content: an item for each tensor and for each value, as torch flattens it."""
    (file,) = plan.files
    items = dict(dcp_writer.flattened(file.content, lambda value: isinstance(value, Ref)))
    names = {value.path: ".".join(map(str, path)) for path, value in items.items() if isinstance(value, Ref)}
    targets = [replace(target, path=names[target.path], file=dcp_writer.FILE) for target in file.targets]
    content = {".".join(map(str, path)): (path, value) for path, value in items.items()}
    if len(content) < len(items):
        double = next(".".join(map(str, path)) for path in items if content[".".join(map(str, path))][0] != path)
        raise plan.model.refuse(f"two of its entries would be called {double} in a DCP folder. Use --to pt.")
    made = WeightFile(dcp_writer.FILE, targets, content)
    texts = {**plan.texts, METADATA: b""}  # written when the places of all items are known
    return replace(plan, format="dcp", files=[made], texts=texts, is_folder=True)


def write_items(file: WeightFile, sink: Sink, elements: Callable[[Target], Iterable[memoryview]]) -> bytes:
    """Write all items of a file one after another; returns the `.metadata` with their positions."""
    targets = {target.path: target for target in file.targets}
    placed = []
    for name, (path, value) in file.content.items():
        begin = sink.size
        if isinstance(value, Ref):
            target = targets[name]
            record = TensorRecord(0, target.dtype, tuple(target.view.shape), target.nbytes)
            length = dcp_writer.write_item(sink, record, [(target.nbytes, elements(target))])
            placed.append(WrittenItem(name, path, begin, length, record.dtype, record.shape))
        else:
            placed.append(WrittenItem(name, path, begin, dcp_writer.write_item(sink, value)))
    return dcp_writer.metadata(placed)


def plan_dcp(model: Source, options: Options, target: Path) -> Plan:
    """Plan a folder of torch.distributed.checkpoint, nested as the torch file of the same model."""
    return in_dcp(plan_pt(model, options, target, "dcp"))
