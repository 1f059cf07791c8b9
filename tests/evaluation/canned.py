"""An engine that answers as a test tells it to, without a model."""

from smolpost.inference.engine import Reply


class Canned:
    """Gives each prompt what `reply(text of the prompt)` returns: a text, a Reply, or a list of them for its samples.

    Attributes:
        asked: [(text of a prompt, settings of the call)].
    """

    def __init__(self, tokenizer, reply):
        self.tokenizer, self.reply, self.asked = tokenizer, reply, []

    def generate(self, prompts, *, num_samples=1, **settings):
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        self.asked += [(text, settings | {"num_samples": num_samples}) for text in texts]
        given = [self.reply(text) for text in texts]
        lists = [replies if isinstance(replies, list) else [replies] * num_samples for replies in given]
        return [[r if isinstance(r, Reply) else Reply(r, len(r), False) for r in replies] for replies in lists]
