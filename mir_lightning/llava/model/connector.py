"""Between vision encoder and language model: LLaVA's projector, an MLP of two layers."""

from typing import Literal

from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

FeatureSelect = Literal["default", "full"]


def connect(
    llm: PreTrainedModel, vision: PreTrainedModel, image_token: int, layer: int, select: FeatureSelect
) -> LlavaForConditionalGeneration:
    """A LLaVA of a causal language model and an encoder, with LLaVA's own projector, untrained.

    The projector gets the features of one ``layer`` of the encoder: all with ``select="full"``, all but the first
    (CLS) with ``"default"``. ``image_token`` is the id of the placeholder of vision tokens.
    """
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=llm.config,
        image_token_index=image_token,
        vision_feature_layer=layer,
        vision_feature_select_strategy=select,
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2,
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(llm.base_model.state_dict())
    model.lm_head.load_state_dict(llm.get_output_embeddings().state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.multi_modal_projector.linear_1.reset_parameters()
    model.model.multi_modal_projector.linear_2.reset_parameters()
    return model
