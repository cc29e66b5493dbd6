"""llama.cpp through the low-level API of llama-cpp-python: decode calls and logits, nothing of its Python wrapper."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt


class LlamaCpp:
    """One model and one context of llama.cpp.

    Args:
        path: a GGUF file.
        context: tokens of the context.
        threads: CPU threads for prompts and single tokens alike.
        repack: let it rearrange weights for speed, AMX included. A build for a CPU that reports AMX crashes on a
            virtual machine that does not pass it on; without rearranging it runs, slower, with the same numbers.
        flash_attention: on or off; None leaves it to llama.cpp.
        weights_of: use the weights of this one instead of loading them again; close it last.
    """

    def __init__(
        self,
        path: Path,
        context: int,
        threads: int,
        repack: bool = True,
        flash_attention: bool | None = None,
        weights_of: LlamaCpp | None = None,
    ) -> None:
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        self._owns_model = weights_of is None
        if weights_of is None:
            model_params = llama_cpp.llama_model_default_params()
            model_params.use_extra_bufts = repack
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
            if not self._model:
                raise RuntimeError(f"llama.cpp cannot load {path}")
        else:
            self._model = weights_of._model
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_ubatch = min(context, params.n_ubatch)
        params.n_threads = params.n_threads_batch = threads
        if flash_attention is not None:
            params.flash_attn_type = int(flash_attention)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens for {path}")
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._position = 0

    def reset(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._position = 0

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        if not llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, length, -1):
            raise RuntimeError(f"llama.cpp cannot go back to {length} tokens")
        self._position = length

    def decode(self, tokens: Sequence[int], every: bool = False) -> npt.NDArray[np.float32]:
        """Logits after the last token, ``[V]``, or with `every` after each, ``[n, V]``."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self._position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or i + 1 == len(tokens)
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        self._position += len(tokens)
        rows = range(len(tokens)) if every else (len(tokens) - 1,)
        found = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, row), (self.vocab_size,)).copy()
            for row in rows
        ]
        return np.stack(found) if every else found[0]

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        if self._owns_model:
            llama_cpp.llama_model_free(self._model)


def version() -> str:
    """Of the bindings, and the instruction sets that this build uses."""
    features = llama_cpp.llama_print_system_info().decode().strip()
    return f"llama-cpp-python {llama_cpp.__version__} ({features})"
