"""
A conversation with a model. A library; sample.py --chat=True is its user.

    from data.conversation import Chat
    talk = Chat(Engine(model), tokenizer)
    for piece in talk.ask('What does shlex.split do?', max_new_tokens=200): print(piece, end='')

How a conversation is written, what opens and what ends a message, is the tokenizer's: see BPETokenizer.chat_start.
"""


class Chat:
    """
    exchanges: list of (question, answer), str and list of int; exchanges.pop() takes the last one back,
    exchanges.clear() forgets all. The answers are kept as the tokens that were drawn.
    system: the system line, None: what the tokenizer has for one. ValueError if it has no format for conversations.
    """
    def __init__(self, engine, tokenizer, system=None):
        tokenizer.chat_start(system, '')
        self.engine, self.tokenizer, self.system, self.exchanges = engine, tokenizer, system, []
        self.special = frozenset(tokenizer.special_ids)

    def prompt(self, question):
        """All that was said, and the question -> the ids from which the model goes on."""
        t = self.tokenizer
        opening, end, behind = t.turn('assistant', '')
        first = self.exchanges[0][0] if self.exchanges else question
        ids, first = t.chat_start(self.system, first)       # which may have put the system line in front of it
        for i, (asked, answer) in enumerate([*self.exchanges, (question, None)]):
            ids += sum(t.turn('user', asked if i else first), []) + opening
            if answer is not None:
                ids += answer + end + behind
        return ids

    def ask(self, question, max_new_tokens, stop_strings=(), **how):
        """
        Streams the answer to question (str), which a special token ends; how as Engine.generate. Left early, by break
        or Ctrl+C, what was said until then stays in the conversation. Where the context is too small for it all and for
        an answer of max_new_tokens, or of a quarter of the context if that is less, the oldest exchanges go;
        self.dropped says how many. ValueError, with the conversation as it was, if the question does not fit alone.
        """
        t, block_size = self.tokenizer, self.engine.config.block_size
        room = block_size - min(max_new_tokens, block_size // 4)
        alone = len(Chat(self.engine, t, self.system).prompt(question))
        if alone > room:
            raise ValueError(f"the question's {alone} tokens do not fit the context of {block_size} "
                             f"with an answer of {block_size - room}: shorten it")
        before = len(self.exchanges)
        prompt = self.prompt(question)
        while len(prompt) > room:
            self.exchanges.pop(0)
            prompt = self.prompt(question)
        self.dropped = before - len(self.exchanges)
        try:
            yield from self.engine.stream(t, prompt, min(max_new_tokens, block_size + 1 - len(prompt)), stop_strings,
                                          stop=self.special, reuse=True, **how)
        finally:
            answer = [token for token in self.engine.held_text[len(prompt):] if token not in self.special]
            # a stop string, and what one pass drew behind it, was not said
            while any(s in t.decode(answer) for s in stop_strings):
                answer.pop()
            self.exchanges.append((question, answer))
