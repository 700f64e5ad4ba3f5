"""Files to tensors: what our own reader maps is what torch would load."""

from __future__ import annotations

from pathlib import Path

import torch

from core.bundle.parts import Part, TorchFile
from core.loading.tensors import read_part


def test_tensors_within_lists_and_tuples_of_a_stream_file_are_mapped(tmp_path):
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(4)
    path = tmp_path / "stream.pt"
    torch.save({"lists": [a, [b]], "tuple": (b, 7), "same": a}, path, _use_new_zipfile_serialization=False)
    with path.open("rb") as file:
        read = read_part(Part(TorchFile(file, Path(path))))
    assert type(read["lists"]) is list and type(read["tuple"]) is tuple and read["tuple"][1] == 7
    for found, expected in ((read["lists"][0], a), (read["lists"][1][0], b), (read["tuple"][0], b), (read["same"], a)):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert read["lists"][0].data_ptr() == read["same"].data_ptr()
