"""
The end of modeling_nanochimera.py, which lab.export writes behind a folded model: what transformers expects of one.

Nothing imports this file. Everything from `NanoChimeraConfig` on is copied; there `GPT` is the folded one, which takes
no config.
"""

from dataclasses import asdict

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model import GPT, DecodingState, GPTConfig


class NanoChimeraConfig(PretrainedConfig):
    """`flags`: GPTConfig's, for which this file was folded; `window`: the most tokens that it can place, or None."""

    model_type = "nanochimera"

    def __init__(self, flags=None, window=None, **kwargs):
        self.flags, self.window = flags or asdict(GPTConfig()), window
        super().__init__(**kwargs)


class Memory(DecodingState):
    """The decoding state, as transformers hands a cache from step to step."""

    is_compileable = False

    def get_seq_length(self, layer_idx=0):
        return self.pos


def built():
    """GPT, whatever transformers wants to save: it builds models without numbers, but not all numbers are weights."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return GPT().to(dtype)
    finally:
        torch.set_default_dtype(dtype)


class NanoChimeraForCausalLM(PreTrainedModel, GenerationMixin):
    """`model(input_ids, labels=...)`, `model.generate(...)` greedily or by sampling; `model.gpt` is nanoChimera's."""

    config_class, base_model_prefix, main_input_name = NanoChimeraConfig, "gpt", "input_ids"
    _is_stateful = True  # what was read cannot be taken back
    _supported_generation_modes = ("greedy_search", "sample")
    _tied_weights_keys = {"gpt.lm_head.weight": "gpt.transformer.wte.weight"}  # only with config.tie_word_embeddings

    def __init__(self, config):
        super().__init__(config)
        for name, value in asdict(GPTConfig()).items():
            if config.flags.get(name) != value:
                raise ValueError(f"config.json has {name}={config.flags.get(name)!r}, but this file is for {value!r}")
        self.gpt = built()
        self.post_init()

    def _init_weights(self, module):
        """GPT has done it."""

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """transformers' own. ValueError where weights are missing: it would go on with random ones."""
        model, found = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if found["missing_keys"] or found["unexpected_keys"]:
            raise ValueError(f"the weights are not those of the flags in config.json: {found}")
        saved, fresh = model.gpt.state_dict(), dict(GPT().named_buffers(remove_duplicate=False))
        for name, buffer in model.gpt.named_buffers():
            if name not in saved:  # computed from the flags; transformers leaves arbitrary numbers there
                buffer.copy_(fresh[name])
        model.gpt.to(model.device)  # what a module keeps beside its tensors
        return (model, found) if output_loading_info else model

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def forward(self, input_ids, attention_mask=None, labels=None, past_key_values=None, use_cache=None,
                logits_to_keep=0, return_dict=None):  # fmt: skip
        """Logits (B, T, V) of input_ids (B, T), and with labels (B, T) the loss in nats per token.

        labels are input_ids, or -100 where nothing is to be predicted: position t is scored on labels[:, t + 1]. In
        training the loss is the whole objective. Padding belongs on the right. logits_to_keep=1: the last position's.
        """
        if attention_mask is not None and (attention_mask.diff(dim=1) > 0).any():
            raise ValueError("padding on the left: the model has no mask, pad on the right or generate one by one")
        state = past_key_values if isinstance(past_key_values, Memory) else Memory() if use_cache else None
        targets = torch.full_like(input_ids, -1)
        if labels is not None:
            targets[:, :-1] = labels[:, 1:].masked_fill(labels[:, 1:] == -100, -1)
        is_last = labels is None and logits_to_keep == 1
        logits, loss = self.gpt(input_ids, None if is_last else targets, state)
        output = CausalLMOutputWithPast(None if labels is None else loss, logits, state)
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # keys and values are not all that is remembered

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, use_cache=True, **_):
        """The tokens that the model has not read; beyond its positions the last ones, read anew for each token."""
        state = past_key_values if isinstance(past_key_values, Memory) else Memory() if use_cache else None
        limit = self.config.window and self.gpt.config.block_size
        if limit is not None and input_ids.size(1) > limit:
            input_ids, attention_mask, state = input_ids[:, -limit:], None, None
        past = 0 if state is None else state.pos
        inputs = {"input_ids": input_ids[:, past:], "past_key_values": state, "attention_mask": attention_mask}
        return inputs | {"use_cache": state is not None, "logits_to_keep": 1}

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """GenerationMixin's, greedy or sampled. Where nothing but cells ends the context, it grows for this text."""
        asked = (generation_config or self.generation_config).to_dict() | kwargs
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        block_size, start = self.gpt.config.block_size, 0 if prompt is None else prompt.size(1)
        new = asked.get("max_new_tokens")
        length = asked.get("max_length") or 0 if new is None else start + new
        length = min(length, self.config.window or 0)
        if length > block_size:
            self.gpt.extend_block_size(length)
        try:
            return super().generate(inputs, generation_config, **kwargs)
        finally:
            if self.gpt.config.block_size > block_size:
                self.gpt.config.block_size = block_size
                for module in self.gpt.having("crop"):
                    module.crop(block_size)
