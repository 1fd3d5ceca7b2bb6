"""The encoding of the paper's authors in plain Python, on a Hugging Face tokenizer: what their trainer makes of a row.

Steps of tokenize_row and build_tokenized_answer (TRL 0.8.6) with SELM's reference response beside chosen and rejected.
"""
from dataclasses import dataclass, field

IGNORED = -100


@dataclass
class RecipeEncoding:
    tokenizer: object  # of transformers
    max_length: int
    max_prompt_length: int
    bos: int = None  # default: the tokenizer's
    eos: int = None
    template: str = None
    _ids: dict = field(default_factory=dict)    # by text
    _texts: dict = field(default_factory=dict)  # by messages and answer

    def __post_init__(self):
        self.bos = self.tokenizer.bos_token_id if self.bos is None else self.bos
        self.eos = self.tokenizer.eos_token_id if self.eos is None else self.eos

    def with_limits(self, max_length, max_prompt_length):
        """The same tokens (computed once) under other limits."""
        return RecipeEncoding(self.tokenizer, max_length, max_prompt_length, self.bos, self.eos, self.template, self._ids, self._texts)

    def render(self, messages, header=False):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header,
                                                  chat_template=self.template)

    def texts(self, messages, answer):
        """The prompt, and the answer with whatever the template puts around an assistant's message alone."""
        key = (*((m["role"], m["content"]) for m in messages), answer)
        if key not in self._texts:
            self._texts[key] = (self.render(messages), self.render([{"role": "assistant", "content": answer}]))
        return self._texts[key]

    def ids(self, text):
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._ids[text]

    def tokenize_ahead(self, rows):
        """All texts of rows (messages, answers...) in one call: quicker."""
        texts = set()
        for messages, *answers in rows:
            for answer in answers:
                prompt, response = self.texts(messages, answer)
                texts |= {prompt, prompt + response}
        texts = sorted(texts - self._ids.keys())
        self._ids.update(zip(texts, self.tokenizer(texts, add_special_tokens=False)["input_ids"]))

    def split(self, messages, answer):
        """The prompt's ids and the answer's ids of the joined text."""
        prompt, response = self.texts(messages, answer)
        alone, full = self.ids(prompt), self.ids(prompt + response)
        if len(full) != len(alone) + len(full[len(alone):]):
            raise ValueError("the joined text has fewer tokens than the prompt")
        start = len(alone)
        if alone != full[:start]:
            start -= 1
        return full[:start], full[start:]

    def row(self, messages, chosen, rejected, reference=None):
        """{name: (prompt ids, answer ids)} of chosen, rejected and, if there is one, reference."""
        answers = {"chosen": chosen, "rejected": rejected}
        if reference is not None:
            answers["reference"] = reference
        parts = {name: self.split(messages, answer) for name, answer in answers.items()}
        one, two = parts["chosen"][0], parts["rejected"][0]
        if sum(a != b for a, b in zip(one, two)) > 1 or abs(len(one) - len(two)) > 1:
            raise ValueError("the prompts of chosen and rejected differ in more than one token")
        parts = {name: ([self.bos] + prompt, answer + [self.eos]) for name, (prompt, answer) in parts.items()}
        longer = max(len(parts["chosen"][1]), len(parts["rejected"][1]))
        cut = {}
        for name, (prompt, answer) in parts.items():
            if len(prompt) + longer > self.max_length:
                prompt = prompt[-self.max_prompt_length:]
            if len(prompt) + longer > self.max_length:
                answer = answer[:self.max_length - self.max_prompt_length]
            cut[name] = (prompt, answer)
        return cut

    def training_row(self, row):
        """The same for a row of reference_training: {best, worst, generated}."""
        cut = self.row(row["messages"], row["best"], row["worst"], row["generated"])
        return {"best": cut["chosen"], "worst": cut["rejected"], "generated": cut.get("reference")}


def labels(prompt, answer):
    return [IGNORED] * len(prompt) + answer
