"""
A conversation with a model. A library; sample.py --chat=True is its user.

    from data.conversation import Chat
    talk = Chat(Engine(model), tokenizer)
    for piece in talk.ask('What does shlex.split do?', max_new_tokens=200): print(piece, end='')

The tokenizer knows how a conversation is written, which tokens open and end a message: see BPETokenizer.chat_start.
"""


class Chat:
    """
    exchanges: list of (question, answer), a str and the list of tokens that were drawn; exchanges.pop() takes the last
    one back, exchanges.clear() forgets all. system: the system line; None: the tokenizer's own. ValueError if the
    tokenizer has no format for conversations.
    """
    def __init__(self, engine, tokenizer, system=None):
        tokenizer.chat_start(system, '')
        self.engine, self.tokenizer, self.system, self.exchanges = engine, tokenizer, system, []
        self.special = frozenset(tokenizer.special_ids)

    def prompt(self, question):
        """The conversation so far and a question -> the ids that the model continues."""
        t = self.tokenizer
        opening, end, behind = t.turn('assistant', '')
        first = self.exchanges[0][0] if self.exchanges else question
        ids, first = t.chat_start(self.system, first)       # some formats put the system line before the first question
        for i, (asked, answer) in enumerate([*self.exchanges, (question, None)]):
            ids += sum(t.turn('user', asked if i else first), []) + opening
            if answer is not None:
                ids += answer + end + behind
        return ids

    def ask(self, question, max_new_tokens, stop_strings=(), **how):
        """
        Streams the answer to question (str); a special token ends it. how: as for Engine.generate. If the caller leaves
        early, by break or Ctrl+C, the answer so far stays in the conversation.
        The oldest exchanges are dropped if the context has no room for an answer of max_new_tokens, or of a quarter of
        the context if that is less; self.dropped says how many. ValueError, with the conversation unchanged, if even
        the question alone does not fit.
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
            # remove a stop string, and what the same pass drew after it
            while any(s in t.decode(answer) for s in stop_strings):
                answer.pop()
            self.exchanges.append((question, answer))
