"""IAL's closed loop in one flat file: plain torch, transformers, peft and sacrebleu, nothing of prefloop.

    python examples/flat_loop.py HuggingFaceTB/SmolLM2-135M-Instruct

Read it from top to bottom to see what prefloop does. What prefloop adds: batched and packed passes,
gates, exact resume, measures on held-out prompts, and a recipe instead of the constants below.
"""

import random
import sys

import torch
from peft import LoraConfig, get_peft_model
from sacrebleu import sentence_chrf
from torch.nn.functional import logsigmoid, relu
from transformers import AutoModelForCausalLM, AutoTokenizer

ROUNDS, EPOCHS, LEARNING_RATE = 2, 2, 1e-4
ETA, GAMMA, LAMBDA = 0.1, 5.0, 1.0  # IAL, section 4.1

# Questions with a good answer each: the target y_t.
DATA = [
    ("Which planet is closest to the Sun?", "Mercury is the planet closest to the Sun."),
    ("Correct the grammar: She don't like coffee.", "She doesn't like coffee."),
    ("What is 17 plus 26?", "17 + 26 = 43."),
    ("Why does ice float on water?", "Water expands when it freezes, so ice is less dense."),
    ("Name the opposite of 'ancient'.", "The opposite of 'ancient' is 'modern'."),
    ("Is a tomato a fruit or a vegetable?", "Botanically a tomato is a fruit."),
]


def prompt_ids(tokenizer, question):
    """The question as a chat, up to where the answer begins: (1, T)."""
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def say(model, tokenizer, question, max_new_tokens):
    """One sampled answer."""
    ids = prompt_ids(tokenizer, question).to(model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=0.7,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def log_prob(model, tokenizer, question, answer):
    """log pi(y|x): the sum over the answer's tokens, its end of turn included, the prompt's left out."""
    prompt = prompt_ids(tokenizer, question)
    ending = answer + tokenizer.eos_token
    answer_ids = tokenizer(ending, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([prompt, answer_ids], dim=1).to(model.device)
    # The logits at position t predict the token at t + 1.
    logits = model(input_ids=ids).logits[0, prompt.shape[1] - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, prompt.shape[1] :, None]).sum()


def spacp(target, better, worse):
    """IAL's loss on log-ratios r(y) = log pi(y|x) - log pi_ref(y|x): the target above both answers."""
    penalty = GAMMA * relu(-target)  # grows when the target becomes less likely than it was
    over_better = logsigmoid(ETA * (target - better - penalty))
    over_worse = logsigmoid(ETA * (target - worse - penalty))
    return -over_better - LAMBDA * over_worse


@torch.no_grad()
def play(model, tokenizer, question, target, max_new_tokens):
    """Player, Advisor, Player again, all of them the same model; then the ranking."""
    draft = say(model, tokenizer, question, max_new_tokens)
    advice = say(
        model,
        tokenizer,
        f"Question: {question}\n\nAnswer: {draft}\n\nIn one sentence, how could this answer be better?",
        max_new_tokens,
    )
    rewrite = say(
        model,
        tokenizer,
        f"The last answer was: {draft}\n\n{advice}\n\nDo the task again, in few words.\n\n{question}",
        max_new_tokens,
    )
    # The judge: chrF, which characters an answer shares with the target. A reward model does better.
    score_draft = sentence_chrf(draft, [target]).score
    score_rewrite = sentence_chrf(rewrite, [target]).score
    return (draft, rewrite) if score_draft > score_rewrite else (rewrite, draft)


def main(source, data=DATA, max_new_tokens=40):
    """Play and train ROUNDS rounds; returns the mean loss of each epoch."""
    torch.manual_seed(0)
    shuffle = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)

    losses = []
    for number in range(ROUNDS):
        # 1. The policy as it stands now writes the answers and ranks them.
        model.eval()
        triples = []
        for question, target in data:
            better, worse = play(model, tokenizer, question, target, max_new_tokens)
            triples.append((question, (target, better, worse)))
            print(f"round {number}  {question}\n  better: {better!r}\n  worse:  {worse!r}")

        # 2. The reference is the policy at the round's start, so its log-probs are taken once, now.
        with torch.no_grad():
            reference = [
                [log_prob(model, tokenizer, question, answer) for answer in answers]
                for question, answers in triples
            ]

        # 3. A new policy: away from both of its own answers, towards the target.
        model.train()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], LEARNING_RATE
        )
        for epoch in range(EPOCHS):
            order = shuffle.sample(range(len(triples)), len(triples))
            total = 0.0
            for n in order:
                question, answers = triples[n]
                ratios = [
                    log_prob(model, tokenizer, question, answer) - before
                    for answer, before in zip(answers, reference[n], strict=True)
                ]
                loss = spacp(*ratios)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
            losses.append(total / len(triples))
            print(f"round {number}  epoch {epoch}  loss {losses[-1]:.4f}")
        # The next round's answers come from this policy: the loop is closed.
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct")
