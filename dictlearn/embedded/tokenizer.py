"""The word-level tokenizer of the embedded LM: one token per word with its leading space, as in GPT-2."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dictlearn.embedded.grammar import TOKEN, vocabulary

UNK, PAD, BOS = "<unk>", "<pad>", "<bos>"
CONTEXT = 128  # tokens


def token_ids() -> dict[str, int]:
    """Ids of all tokens: the special ones first, then the vocabulary of the grammar in sorted order."""
    return {token: index for index, token in enumerate((UNK, PAD, BOS, *vocabulary()))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """`decode(encode(text)) == text` for every text of the grammar; encode() adds no special tokens."""
    tokenizer = Tokenizer(models.WordLevel(token_ids(), unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN.pattern), behavior="isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=BOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
