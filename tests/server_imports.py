"""Everything that a server imports while it starts on a tiny Llama, for the process that servers are forked from."""

import gc
import importlib

for _name in (
    "manylora.engine.build",
    "manylora.lifecycle.weights.served",
    "manylora.models.codec",
    "manylora.models.loading",
    "manylora.models.stored_weights",
    "tests.e2e.serve_once",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(_name)
gc.collect()
gc.freeze()  # or each server's first collection would copy all of it
