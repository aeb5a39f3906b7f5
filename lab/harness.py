"""
A model of ours in lm-evaluation-harness: log-likelihoods and texts, as its own `hf` model computes them.

Rows of a batch are padded on the right, which changes nothing before it (contracts 2 and 5). Where several
continuations follow one context, as the choices of a question do, the context is read once: each continuation goes on
from a copy of the decoding state. What is longer than block_size loses its first tokens; `truncated` counts that.
"""

import copy
import math

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import sample
from configurator import ConfigError
from data.corpus import DataError, first_ids
from model import DecodingState

MAX_NEW = 256  # tokens of a text where a task gives no max_gen_toks, as in the harness


def copied(state):
    """A decoding state of the same tokens that can be advanced by itself."""
    other = DecodingState()
    other.pos = state.pos
    other.stores = {module: copy.deepcopy(store) for module, store in state.stores.items()}
    return other


def pays(context, group):
    """Whether to read a context once for its continuations, one by one, and not in each row of a batch."""
    return (len(group) - 1) * len(context) > sum(len(continuation) for _, continuation in group)


def score_of(logits, tokens):
    """(sum of log p(tokens), whether each is the likeliest) by logits (n, V) of n tokens; log-probabilities will do."""
    wanted = torch.tensor(tokens, device=logits.device)
    log_probs = logits.float().log_softmax(-1).gather(1, wanted[:, None])
    return log_probs.sum().item(), bool((logits.argmax(-1) == wanted).all())


def sampling_of(settings):
    """(SampleConfig, max_gen_toks) of a task's generation_kwargs; greedy unless they ask for sampling."""
    settings = dict(settings)
    until, most = settings.pop("until", None) or (), settings.pop("max_gen_toks", MAX_NEW)
    until = (until,) if isinstance(until, str) else tuple(filter(None, until))
    temperature = settings.get("temperature", 1.0) if settings.pop("do_sample", False) else 0.0
    kept = {name: settings[name] for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in settings}
    if unknown := sorted(settings.keys() - kept.keys() - {"temperature"}):
        raise ConfigError(f"generation_kwargs of a task: {', '.join(unknown)} is not supported")
    return sample.SampleConfig(**{"top_k": None} | kept, temperature=temperature, max_new_tokens=most, stop=until)


class NanoChimeraLM(TemplateLM):
    """A model of `GPT` with one of our tokenizers, on the device where it is."""

    def __init__(self, model, text_tokenizer, batch_size=16):
        super().__init__()
        self.model, self.text, self.batch_size = model.eval(), text_tokenizer, batch_size
        self.max_length, self._device = model.config.block_size, next(model.parameters()).device
        self.truncated, self.tokens_read = 0, 0  # requests that lost their beginning; tokens that went through blocks

    @property
    def eot_token_id(self):
        """What an empty context stands for: the end of a text, or without such a token a newline."""
        return first_ids(self.text)[0] if self.text.eot is None else self.text.eot

    def tok_encode(self, string, add_special_tokens=None, **_):
        try:
            ids = self.text.encode(string)
        except DataError as e:
            raise DataError(f"a task's text cannot be read by this model's tokenizer: {e}") from e
        if ids and max(ids) >= self.model.config.vocab_size:
            raise DataError(f"a task's text has token id {max(ids)}, the model only {self.model.config.vocab_size} ids")
        return ids

    @property
    def tokenizer_name(self):
        return self.text.name

    # Log-likelihoods ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, rows, state=None):
        """Logits (B, T, V) of lists of token ids, padded on the right to the longest."""
        T = max(map(len, rows))
        self.tokens_read += T * len(rows)
        idx = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=self.device)
        return self.model(idx, state=state, all_logits=True)[0]

    def cut(self, context, continuation):
        """The last tokens of a context that fit before a continuation; ConfigError where that alone is too long."""
        if len(continuation) > self.max_length:
            raise ConfigError(f"a continuation has {len(continuation)} tokens, more than block_size={self.max_length}")
        kept = (context or [self.eot_token_id])[len(continuation) - self.max_length - 1 :]
        self.truncated += len(kept) < len(context)
        return kept

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """[(log-likelihood, is greedy)] of requests (texts, context ids, continuation ids), in their order."""
        groups, found = {}, [(0.0, True)] * len(requests)  # an empty continuation is certain
        for i, (_, context, continuation) in enumerate(requests):
            if continuation:
                groups.setdefault(tuple(self.cut(context, continuation)), []).append((i, continuation))
        shared = [(context, group) for context, group in groups.items() if pays(context, group)]
        alone = [(context, *row) for context, group in groups.items() if not pays(context, group) for row in group]
        alone.sort(key=lambda row: -len(row[0]) - len(row[2]))  # rows of about one length, the longest first
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods", unit="request") as bar:
            for context, group in shared:
                for (i, _), score in zip(group, self.score_choices(list(context), [c for _, c in group])):
                    found[i] = score
                bar.update(len(group))
            for start in range(0, len(alone), self.batch_size):
                part = alone[start : start + self.batch_size]
                scores = self.score_rows([(list(context), continuation) for context, _, continuation in part])
                for (_, i, _), score in zip(part, scores):
                    found[i] = score
                bar.update(len(part))
        for (texts, _, _), score in zip(requests, found):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    def score_rows(self, pairs):
        """Scores of (context, continuation) pairs in one batch."""
        logits = self.logits([(context + continuation)[:-1] for context, continuation in pairs])
        starts = [len(context) - 1 for context, _ in pairs]
        return [score_of(logits[i, s : s + len(c)], c) for i, (s, (_, c)) in enumerate(zip(starts, pairs))]

    def score_choices(self, context, continuations):
        """Scores of several continuations of one context, which is read once."""
        state, found = DecodingState(), []
        first = self.logits([context], state)[0, -1:]
        for continuation in continuations:
            logits = first
            if len(continuation) > 1:
                more = self.logits([continuation[:-1]], copied(state))[0]
                logits = torch.cat((first, more))
            found.append(score_of(logits, continuation))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihoods of whole texts, in windows of block_size that predict each token once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            for window in self.windows(self.tok_encode(request.args[0])):
                windows.append((None, *window))
                owners.append(i)
        found = [0.0] * len(requests)
        for i, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            found[i] += score
        for request, score in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return found

    def windows(self, ids):
        """Pairs (context, tokens to predict) that cover token ids."""
        return map(make_disjoint_window, get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1))

    def bits_per_byte(self, text):
        """(bits per UTF-8 byte of a text, its bytes, its tokens)."""
        ids, size = self.tok_encode(text), len(text.encode("utf-8"))
        scores = self._loglikelihood_tokens([(None, *window) for window in self.windows(ids)])
        return -sum(score for score, _ in scores) / math.log(2) / size, size, len(ids)

    # Text -----------------------------------------------------------------------------------------------------------

    def generate_until(self, requests, disable_tqdm=False):
        """Texts after their contexts, up to a stop string, the end of text or max_gen_toks."""
        batches, found = {}, [""] * len(requests)
        for i, request in enumerate(requests):
            context, settings = request.args
            cfg = sampling_of(settings)
            ids = self.tok_encode(context) or [self.eot_token_id]
            room = self.max_length - cfg.max_new_tokens  # without any, the text goes on beyond the block
            kept = ids[-(room if room > 0 else self.max_length) :]
            self.truncated += len(kept) < len(ids)
            batches.setdefault((len(kept), repr(cfg)), (cfg, []))[1].append((i, kept))
        with tqdm(total=len(requests), disable=disable_tqdm, desc="texts", unit="text") as bar:
            for cfg, rows in batches.values():  # rows of one length need no padding
                for start in range(0, len(rows), self.batch_size):
                    part = rows[start : start + self.batch_size]
                    *_, texts = sample.grow(
                        self.model, self.text, torch.tensor([ids for _, ids in part], device=self.device), cfg
                    )
                    for (i, _), text in zip(part, texts):
                        found[i] = text
                    bar.update(len(part))
        for request, text in zip(requests, found):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found
