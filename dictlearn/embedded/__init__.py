"""A small real language model that ships with the package, and the text it was trained on as a generator.

`LM_FOLDER` opens with `AutoModelForCausalLM` and `AutoTokenizer`. `document(seed, index)` is text of its
distribution, with the log-probability of every token; seed 0 is the training text, other seeds are unseen.
`python -m dictlearn.embedded.check` measures the model, `python -m dictlearn.embedded.train_lm` remakes it.
"""

from pathlib import Path

from dictlearn.embedded.text import Document, document, documents

LM_FOLDER: Path = Path(__file__).parent / "lm"

__all__ = ["LM_FOLDER", "Document", "document", "documents"]
