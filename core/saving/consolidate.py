"""Make plain files of a step in shards: tensor by tensor, so that the model never has to fit in memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from ..bundle.bundle import ALL_PARTS, OPTIMIZER, TOKENIZER, Bundle, open_bundle
from ..bundle.commit import CONFIG, ModelFolder
from ..bundle.output import Output
from ..bundle.parts import Part, ShardedFile
from ..bundle.verify import tensors_digest, verify
from ..bundle.write import Content, Writer, write_bundle
from ..containers.checksum import CHUNK
from ..containers.spec import TensorSpec
from ..containers.tensors.reading import Gatherer
from ..containers.tensors.views import stored
from ..containers.torch_files.layout import TensorRecord, pickled, write_torch_file
from ..containers.trees import map_leaves


def consolidate(place: ModelFolder) -> Bundle | None:
    """Replace the newest step, which is in shards, by the same step in plain files; the caller holds the lock.

    One commit replaces the shards, which are removed when it is durable. Returns the new bundle, open; None where the
    newest step is plain already.

    Raises: CheckpointDamaged, when nothing is changed; OSError.
    """
    with open_bundle(place.path) as bundle:
        if not bundle.is_sharded:
            return None
        verify(bundle, ALL_PARTS)
        files: dict[str, Content] = {name: _writer(name, part) for name, part in bundle.torch_parts.items()}
        files[CONFIG] = bundle.config_values
        if bundle.tokenizer is not None:
            files[TOKENIZER] = bundle.tokenizer
        optimizer_file = OPTIMIZER if OPTIMIZER in files else None
        state = bundle.state.committed(place.newest_id(), optimizer_file=optimizer_file, **bundle.state.descent())
        place.recover()
        with place.staging() as stage:
            write_bundle(place, stage, state, files)
            place.commit(stage)
        place.roll_forward()
        place.prune([step for step in place.kept_steps() if step == bundle.step])
    return open_bundle(place.path)


def _writer(name: str, part: Part) -> Writer:
    """Write the torch file of a part, which may be in shards."""

    def write(output: Output) -> str:
        source = part.source
        source.refuse_foreign()
        if not isinstance(source, ShardedFile):  # also.pt, which is whole already
            source.file.seek(0)
            shutil.copyfileobj(source.file, output, CHUNK)
            return tensors_digest(source.header)
        content = _numbered(part.content) if name == OPTIMIZER else part.content
        specs: list[TensorSpec] = []

        def put(value: Any) -> Any:
            if not isinstance(value, TensorSpec):
                return value
            specs.append(value)
            return TensorRecord(len(specs) - 1, value.dtype, value.shape, value.nbytes)

        data_pkl = pickled(map_leaves(put, content))
        with Gatherer() as gatherer:
            pieces = ((spec.nbytes, gatherer.pieces(stored(source.header, spec))) for spec in specs)
            return write_torch_file(output, data_pkl, pieces)

    return write


def _numbered(content: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer state by the numbers of its parameters, as torch.optim has it, in place of their names."""
    names = [name for group in content["param_groups"] for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in content["param_groups"]]
    entries = content.get("state", {})  # an empty dict is no item of a shard
    state = {number[name]: entries[name] for name in names if name in entries}
    return {"state": state, "param_groups": groups}
