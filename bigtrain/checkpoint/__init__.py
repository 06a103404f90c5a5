"""Checkpoints: the state of the run, not of an engine; whole or not there; verified before use.

``<run>/checkpoints/step-00001000/`` holds

- ``rank-00000.safetensors`` ...: what each rank wrote, boxes of tensors named ``<key>@<offset>,<offset>``;
- ``run_state.json``: everything that is not a tensor;
- ``manifest.json``, written last: sizes and hashes of the files, and where each box of each tensor lies.

A directory of that name is complete: it is written under a name with ``.tmp-`` and renamed. Modules: ``manifest``
(what is where), ``shard`` (files of ranks), ``store`` (directories of a run), ``saver`` (writing, in the background),
``loader`` (verifying and reading), ``dcp`` (for torch.distributed.checkpoint).
"""
