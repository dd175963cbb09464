r"""Writes on where a prompt ends, with a trained model.

python generate.py --workdir=runs/quickstart --prompt="def main(" [--max_tokens=100 ...]

The prompt may also come from a file or the standard input. The text goes to the standard output,
statistics to the standard error. With --interactive, every line that is typed is answered.
"""

import sys

from absl import flags

from sparsek_jax.generation.command import Request, generate
from sparsek_jax.generation.sampling import Sampling
from sparsek_jax.training.cli import run
from sparsek_jax.training.config import ConfigError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File with the text to continue.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    "File with a prompt on every line, all continued together. Prints a JSON object for each.",
)
_INTERACTIVE = flags.DEFINE_bool("interactive", False, "Answer line by line; Ctrl-D ends.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Most tokens to write, or of an answer.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Divides the logits; 0 takes the likeliest token."
)
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from so many of the likeliest tokens.")
_TOP_P = flags.DEFINE_float(
    "top_p", None, "Draw from the fewest likeliest tokens with this probability together."
)
_SEED = flags.DEFINE_integer("seed", 0, "Decides the text, given everything else.")
_STOP = flags.DEFINE_multi_string("stop", [], "End the text before this string; may be repeated.")
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    None,
    "With --interactive and layers that remember all tokens: most tokens of the conversation; 8192 "
    "by default. Other layers remember as much of any length.",
)
_EXPLAIN = flags.DEFINE_string(
    "explain",
    None,
    "Directory for explain.html and explain.png: which tokens every layer and head kept, for how "
    "long, and what displaced them.",
)
flags.mark_flag_as_required("workdir")
flags.register_validator("workdir", lambda path: path != "", "expected a directory")


def main() -> None:
    """Generates what the flags ask for."""
    try:
        sampling = Sampling(
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            top_p=_TOP_P.value,
            seed=_SEED.value,
        )
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    request = Request(
        workdir=_WORKDIR.value,
        prompt=_PROMPT.value,
        prompt_file=_PROMPT_FILE.value,
        prompts_file=_PROMPTS_FILE.value,
        interactive=_INTERACTIVE.value,
        max_tokens=_MAX_TOKENS.value,
        sampling=sampling,
        stop=_STOP.value,
        max_length=_MAX_LENGTH.value,
        explain=_EXPLAIN.value,
    )
    try:
        status = generate(request, stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    run(main)
