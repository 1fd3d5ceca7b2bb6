"""Token ids for the peers. prompts: of the sample's rows, one list a line. pairs: of a ranked iteration file, prompt, best, worst and
generated answer of each row."""

import argparse
import json

from common import emit, read_rows


def encode_prompts(arguments, tokenizer):
    rows = read_rows(arguments.data)[: arguments.rows]
    with open(arguments.output, "w") as out:
        for row in rows:
            text = tokenizer.apply_chat_template(row["chosen"][:-1], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][-arguments.max_prompt_length:]
            out.write(json.dumps(ids) + "\n")
    return {"rows": len(rows)}


def encode_pairs(arguments, tokenizer):
    import h5py

    file = h5py.File(arguments.iter, "r")
    text = lambda group, i: bytes(file[f"{group}/text"][file[f"{group}/text_offsets"][i]: file[f"{group}/text_offsets"][i + 1]]).decode()
    names = ["generated", "chosen", "rejected"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with open(arguments.output, "w") as out:
        for i in range(len(file["pairs/best"])):
            rows = file["prompts/messages/row_offsets"]
            messages = [{"role": ["system", "user", "assistant"][file["prompts/messages/role"][j]], "content": text("prompts/messages", j)}
                        for j in range(rows[i], rows[i + 1])]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"][-arguments.max_prompt_length:]
            answer = lambda c: (tokenizer(text(f"responses/{names[c]}", i), add_special_tokens=False)["input_ids"] + [end])[: arguments.max_length - len(ids)]
            best, worst = int(file["pairs/best"][i]), int(file["pairs/worst"][i])
            out.write(json.dumps({"prompt": ids, "best": answer(best), "worst": answer(worst), "generated": answer(0), "candidates": [best, worst]}) + "\n")
    return {"rows": len(file["pairs/best"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["prompts", "pairs"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--data")
    parser.add_argument("--iter")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--max-prompt-length", type=int, default=512)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    emit((encode_prompts if arguments.what == "prompts" else encode_pairs)(arguments, tokenizer))


main()
