"""One decoder for all of our model families: what differs between them is the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from everlearn.blocks.context import Context, visible_keys
from everlearn.blocks.feed_forward import SwiGLU, continuum_of_swiglu
from everlearn.blocks.hope import DecoderLayer
from everlearn.errors import InvalidArgument
from everlearn.levels import Level
from everlearn.memories.continuum import Continuum
from everlearn.models.backbone_cache import StateCache
from everlearn.models.backbone_config import BackboneConfig
from everlearn.models.mixers import make_mixer

__all__ = ["Backbone", "BackboneForCausalLM", "register"]


def _feed_forward(config: BackboneConfig) -> nn.Module:
    assert config.intermediate_size is not None
    if len(config.cms_periods) == 1:
        return SwiGLU(config.hidden_size, config.intermediate_size)
    return continuum_of_swiglu(config.hidden_size, config.intermediate_size, config.level_names(), config.cms_wiring)


class BackbonePreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = BackboneConfig
    config: BackboneConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            initialization.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            if module.weight is not None:
                initialization.ones_(module.weight)
        elif hasattr(module, "draw"):  # a module that has parameters of its own
            parameters, drawn = dict(module.named_parameters()), cast(Any, module).draw()
            for name, value in drawn.items():
                initialization.copy_(parameters[name], value)
        elif isinstance(module, Continuum):
            for logit in module.mix:
                initialization.zeros_(logit)


class Backbone(BackbonePreTrainedModel):
    """Embedding, layers and the last norm."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DecoderLayer(config.hidden_size, make_mixer(name, config), _feed_forward(config), eps=config.rms_norm_eps)
            for name in config.mixers()
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value  # type: ignore[assignment]

    def new_cache(self) -> StateCache:
        """An empty cache for this model."""
        return StateCache(len(self.layers))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: tokens ``[B, T]``; or ``inputs_embeds`` ``[B, T, hidden_size]`` in their place.
            attention_mask: 1 for tokens, 0 for padding, ``[B, past + T]``.
            position_ids: positions ``[B, T]``; 0 begins a document, before which no token is seen.
            past_key_values: a :class:`StateCache` of this model; it is updated in place.
            use_cache: whether a cache is returned; by default as the config says, but not in training.
            document_ids: alternative to ``position_ids``: any number that changes where a document begins ``[B, T]``.
            output_hidden_states: also return the input of every layer and the last norm's output.

        Raises:
            InvalidArgument: shapes that do not fit, an empty sequence, a cache that is not a StateCache of this model.
        """
        x = self._embed(input_ids, inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = self._cache(past_key_values, x.shape[0])
        context = self._context(x, attention_mask, position_ids, document_ids, cache)
        states, hidden = [], []
        for layer, state in zip(self.layers, cache.states()):
            hidden.append(x)
            x, state = layer(x, state, context)
            states.append(state)
        x = self.norm(x)
        if use_cache or past_key_values is not None:
            cache.store(states, x.shape[1])
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache if use_cache or past_key_values is not None else None,
            hidden_states=(*hidden, x) if output_hidden_states else None,  # type: ignore[arg-type]
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidArgument("input_ids, inputs_embeds: expected exactly one of the two")
        if input_ids is None:
            assert inputs_embeds is not None
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[1] == 0:
                raise InvalidArgument(
                    f"inputs_embeds: got shape {list(inputs_embeds.shape)}, expected [batch, time >= 1, d]"
                )
            return inputs_embeds
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise InvalidArgument(f"input_ids: got shape {list(input_ids.shape)}, expected [batch, time >= 1]")
        if input_ids.dtype not in (torch.long, torch.int):
            raise InvalidArgument(f"input_ids: got dtype {input_ids.dtype}, expected token numbers")
        return self.embed_tokens(input_ids)

    def _cache(self, past: Any, batch: int) -> StateCache:
        if past is None:
            return self.new_cache()
        if not isinstance(past, StateCache) or len(past.states()) != len(self.layers):
            raise InvalidArgument(
                f"past_key_values: got {type(past).__name__}, expected a StateCache of {len(self.layers)} layers "
                "(model.new_cache(), or what an earlier call returned)"
            )
        if past.batch_size not in (-1, batch):
            raise InvalidArgument(f"past_key_values: got {past.batch_size} rows, expected {batch} as in input_ids")
        return past

    def _context(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, documents: Tensor | None, cache: StateCache
    ) -> Context:
        (batch, length, _), seen = x.shape, cache.get_seq_length()
        if mask is not None and (mask.dim() != 2 or mask.shape != (batch, seen + length)):
            raise InvalidArgument(
                f"attention_mask: got shape {list(mask.shape)}, expected {[batch, seen + length]} (past included)"
            )
        for name, given in (("position_ids", positions), ("document_ids", documents)):
            if given is not None and given.shape not in ((batch, length), (1, length)):
                raise InvalidArgument(f"{name}: got shape {list(given.shape)}, expected {[batch, length]}")
        mask = None if mask is None or bool(mask.all()) else mask.bool()
        here = None if mask is None else mask[:, seen:]
        starts = _document_starts(positions, documents, here, seen, batch)
        counted = (here if here is not None else x.new_ones(batch, length, dtype=torch.bool)).long()
        real = counted.sum(1) if cache.real is None else cache.real + counted.sum(1)
        before = torch.zeros_like(real) if cache.real is None else cache.real
        if positions is None or documents is not None:
            positions = (before[:, None] + counted.cumsum(1) - 1).clamp(min=0)
        visible = None
        if "attention" in self.config.mixers():
            first = _first_visible(starts, cache.first, seen, length)
            visible = visible_keys(length, seen, mask, first)
            cache.first = None if first is None else first[:, -1]
        cache.real = real
        return Context(positions, here, starts, visible)


def _document_starts(
    positions: Tensor | None, documents: Tensor | None, mask: Tensor | None, seen: int, batch: int
) -> Tensor | None:
    """Where documents begin ``[B, T]``; None when the only beginning is that of the sequence itself."""
    if documents is not None:
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts[:, 0] = seen == 0
    elif positions is not None:
        starts = positions == 0
    else:
        return None
    starts = starts.expand(batch, -1)
    if mask is not None:
        starts = starts & mask
    if seen == 0:  # nothing to forget before the first token of a row
        real = torch.ones_like(starts) if mask is None else mask
        starts = starts & (real.int().cumsum(1) > 1)
    return starts if bool(starts.any()) else None


def _first_visible(starts: Tensor | None, carried: Tensor | None, seen: int, length: int) -> Tensor | None:
    """Index of the first key of each query's document ``[B, T]``, or None when that is 0 everywhere."""
    if starts is None:
        return None if carried is None else carried[:, None].expand(-1, length)
    index = torch.arange(seen, seen + length, device=starts.device)
    first = torch.where(starts, index, 0).cummax(1).values
    return first if carried is None else torch.maximum(first, carried[:, None])


class BackboneForCausalLM(BackbonePreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_cache(self) -> StateCache:
        """An empty cache for this model."""
        return self.model.new_cache()

    def levels(self, optimizer: Callable[..., Any] | None = None) -> tuple[Level, ...]:
        """The continuum memory's levels with their periods in tokens."""
        kinds = {} if optimizer is None else {"optimizer": optimizer}
        return tuple(Level(n, p, **kinds) for n, p in zip(self.config.level_names(), self.config.cms_periods))

    def level_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of each level of the continuum memory, over all layers; empty with a single level."""
        found: dict[str, list[nn.Parameter]] = {}
        for layer in self.model.layers:
            feed_forward = layer.feed_forward
            if isinstance(feed_forward, Continuum):
                for name in feed_forward.names:
                    found.setdefault(name, []).extend(feed_forward.level_parameters(name).values())
        return found

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; arguments as in :meth:`Backbone.forward`, and as everywhere in transformers (``return_dict``).

        ``labels`` ``[B, T]`` are the tokens themselves (shifted here), -100 where there is nothing to learn. The first
        token of a document is not predicted from the document before.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_ids=document_ids,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            if labels.shape != hidden.shape[:2]:
                raise InvalidArgument(f"labels: got shape {list(labels.shape)}, expected {list(hidden.shape[:2])}")
            starts = _document_starts(position_ids, document_ids, None, 0, labels.shape[0])
            if starts is not None:
                labels = labels.masked_fill(starts, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give `generate` our cache where it would make one of its own."""
        if generation_config.cache_implementation is not None:
            raise InvalidArgument(
                f"cache_implementation: got {generation_config.cache_implementation!r}, expected None: "
                "these models keep states, not keys and values"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = self.new_cache()


def register(config: type[BackboneConfig], model: type[Backbone], for_causal_lm: type[BackboneForCausalLM]) -> None:
    """Make a family known to transformers' Auto classes by the ``model_type`` of its configuration."""
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForCausalLM.register(config, for_causal_lm)
