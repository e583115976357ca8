"""Conversations as nanochat and as ChatML write them. With tokenizers beside a template as the hub has it."""
import contextlib
import io
import json

import numpy as np
import pytest

from conftest import LLAMA, TEMPLATE, TEXTS, TINY, build, prompt_of, ran, refused, refuses, run
from data.checkpoint import save_checkpoint
from data.conversation import Chat
from data.foreign_tokenizer import hf_tokenizer
from data.loader import load_meta
from data.tokenizer import BPETokenizer, from_meta, train_bpe
from data.writer import cut_chats, write_chats
from engine import Engine, Sampling
from model import GPT, GPTConfig

USER, BOT = {'role': 'user', 'content': ' Hi,\n it is me.'}, {'role': 'assistant', 'content': "Hello, it's you."}
SYSTEM = {'role': 'system', 'content': 'Be brief.'}
KIND = '<|im_start|>system\nBe kind.<|im_end|>\n'


def chatml(system='Be kind.'):
    tokens = train_bpe(TEXTS, 300, special_tokens=[]).meta()['ranks']
    ranks = {token.encode('latin-1'): i for i, token in enumerate(tokens)}
    return BPETokenizer(ranks, special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'], special_ids=[0, 1, 2],
                        system=system)


NANO = train_bpe(TEXTS, 300)
PLAIN = train_bpe(TEXTS, 300, special_tokens=['<|bos|>'])


def test_chatml():
    t = chatml()
    ids, mask = t.render_chat([USER, BOT, USER, BOT])
    exchange = ("<|im_start|>user\n Hi,\n it is me.<|im_end|>\n"
                "<|im_start|>assistant\nHello, it's you.<|im_end|>\n")
    assert t.decode(ids) == KIND + 2 * exchange and len(mask) == len(ids)
    assert t.decode([i for i, m in zip(ids, mask) if m]) == 2 * "Hello, it's you.<|im_end|>" and ids[0] == 1
    asked = exchange.split('<|im_start|>assistant')[0]
    assert t.decode(t.render_chat([SYSTEM, USER])[0]) == KIND.replace('kind', 'brief') + asked
    prompt = prompt_of(t, [USER])
    assert t.decode(prompt) == KIND + asked + '<|im_start|>assistant\n'
    # the answer is not merged with what stands before it, so that the prompt begins every conversation about it
    shifted = t.render_chat([USER, {'role': 'assistant', 'content': '\n\n  x'}])[0]
    assert shifted[:len(prompt)] == prompt
    # without a line of its own there is none, unless somebody gives one; an empty one is none
    assert t.render_chat([SYSTEM | {'content': ''}, USER]) == chatml(None).render_chat([USER])
    assert chatml(None).render_chat([SYSTEM, USER]) == t.render_chat([SYSTEM, USER])
    # what users type is text, even if it looks like the end of their message
    assert t.render_chat([USER | {'content': '<|im_end|>'}])[0].count(2) == 2


def test_chatml_is_what_a_template_says():
    jinja2, tokenizers = pytest.importorskip('jinja2'), pytest.importorskip('tokenizers')
    t = chatml()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(hf_tokenizer(t)))
    for messages in ([USER], [SYSTEM, USER], [USER, BOT, USER]):
        text = jinja2.Template(TEMPLATE).render(messages=messages, add_generation_prompt=True)
        assert prompt_of(t, messages) == theirs.encode(text).ids
    for messages in ([USER, BOT], [SYSTEM, USER, BOT, USER, BOT]):
        assert t.render_chat(messages)[0] == theirs.encode(jinja2.Template(TEMPLATE).render(messages=messages)).ids


def test_formats_are_known_by_their_special_tokens():
    assert (NANO.chat, PLAIN.chat, chatml().chat) == ('nanochat', None, 'chatml')
    refuses('no special tokens for conversations', PLAIN.render_chat, [USER])


def test_rows_end_with_answers_not_with_questions(tmp_path):
    t = chatml()
    turns = [USER, BOT, {'role': 'user', 'content': 'x' * 50}, BOT]
    ids, mask = t.render_chat(turns)
    first = len(t.render_chat(turns[:2])[0]) - 1            # without the line end
    second = len(t.render_chat(turns[:3])[0]) - 1           # where the second question ends, with the same token
    assert ids[second - 1] == 2 and mask[second - 1] == 0
    for row in (first, second, second + 5):
        assert cut_chats([(ids, mask)], row, 2) == ([(ids[:first], mask[:first])], 1, 0)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        meta = write_chats(tmp_path, t, [(ids, mask)] * 3, [(ids, mask)], len(ids), 'toy')
    assert '3 and 1 conversations with 8 answers' in out.getvalue() and meta['special_ids'] == [0, 1, 2]
    assert np.fromfile(tmp_path / 'val.bin', np.uint16).tolist() == ids[:-1] + [0]  # padded with what ends a text
    assert from_meta(load_meta(tmp_path)).meta() == t.meta()


@pytest.fixture(scope='module')
def models():
    return {t.chat: build(t, kv=1, block_size=96) for t in (chatml(), NANO)}


@pytest.mark.parametrize('kind, system', [('chatml', None), ('chatml', 'Be brief.'), ('nanochat', None),
                                          ('nanochat', 'Be brief.')])
def test_a_chat_is_its_conversation(models, kind, system):
    """Every answer is decoded from the whole conversation, the system line always in front, also when others go."""
    t, model = chatml() if kind == 'chatml' else NANO, models[kind]
    talk, past, dropped = Chat(Engine(model), t, system), [], 0
    close = sum(t.turn('assistant', '')[1:], [])
    for i, question in enumerate(['the inner', 'theatre', 'it is', 'zebras & more', 'x', 'other things', 'y']):
        sampling = Sampling(0.8, seed=i)
        answer = ''.join(talk.ask(question, 12, sampling=sampling))
        while True:
            ids = []
            for n, (asked, old) in enumerate(past + [(question, None)]):
                first = [SYSTEM | {'content': system}] if system and not n else []
                alone = prompt_of(t, [*first, USER | {'content': asked}])
                start = len(t.chat_start(None, '')[0]) if n else 0  # of the first only
                ids += alone[start:] + ([] if old is None else old + close)
            if len(ids) <= 96 - 12:
                break
            past, dropped = past[1:], dropped + 1
        new, = Engine(model).complete([ids], 12, sampling, stop=t.special_ids)
        new = [token for token in new if token not in t.special_ids]
        assert answer == t.decode(new)
        past.append((question, new))
    assert talk.exchanges == past and dropped > 0
    refuses('tokens do not fit the context of 96 with an answer of 12', list, talk.ask('zebras' * 30, 12))
    assert talk.exchanges == past
    refuses('no special tokens for conversations', Chat, Engine(model), PLAIN)


LIBRARY = {'zoo': '"""Animals."""\ndef feed(*animals):\n    """Give them what they eat."""\n',
           'optparse': 'def parse(options):\n    """Read the options given."""\n'}  # held out


def test_fine_tuning_and_talking_in_chatml(tmp_path):
    t = chatml()
    config = GPTConfig(block_size=128, vocab_size=t.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, **LLAMA)
    save_checkpoint(str(tmp_path / 'smol' / 'best.pt'), GPT(config), t.meta(), step=0, dataset='gone')
    (tmp_path / 'lib').mkdir()
    for name, text in LIBRARY.items():
        (tmp_path / 'lib' / f'{name}.py').write_text(text)
    got = ran('data/pydoc_chat/prepare.py', f'--tokenizer={tmp_path}/smol', f'--root={tmp_path}/lib', '--row=128',
              f'--out_dir={tmp_path}/data')
    text = t.decode(np.fromfile(tmp_path / 'data' / 'val.bin', np.uint16))
    assert text.startswith(KIND + '<|im_start|>user\n') and 'Read the options given.<|im_end|>' in text
    got = run('train.py', 'config/sft_pydoc.py', *TINY[:3], f'--init_from={tmp_path}/smol/best.pt', '--max_iters=2',
              f'--dataset={tmp_path}/data', f'--out_dir={tmp_path}/out', '--block_size=128', '--batch_size=2',
              '--eval_interval=2')
    assert got.status == 0 and not got.err, got.err

    talk = lambda *how: run('sample.py', '--chat=True', f'--out_dir={tmp_path}/out', '--max_new_tokens=8', *how,
                            stdin='What is zoo for?\n')
    plain = talk()
    assert plain.status == 0 and plain.out.endswith('\n'), plain.err
    question = '<|im_start|>user\nWhat is zoo for?<|im_end|>\n'
    assert plain.names['tokenizer'].meta() == t.meta()
    assert t.decode(plain.names['engine'].held_text).startswith(KIND + question)
    told = talk('--system=Be\\nkind, zoo.')
    assert t.decode(told.names['engine'].held_text).startswith(KIND.replace(' kind', '\nkind, zoo') + question)
    # a text is at its end where the next one would begin, or a message ends
    assert set(run('sample.py', f'--out_dir={tmp_path}/out', '--max_new_tokens=2').names['tokenizer'].ends) == {0, 2}


def test_a_chat_needs_a_format(tmp_path):
    save_checkpoint(str(tmp_path / 'best.pt'), build(PLAIN, block_size=32), PLAIN.meta(), step=0, dataset='gone')
    refused(run('data/pydoc_chat/prepare.py', f'--tokenizer={tmp_path}'), 'has no special tokens .*which chat needs')
