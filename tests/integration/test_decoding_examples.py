"""The examples that write text, at a tiny size."""

import json

from ..training.test_examples import load_example


def test_generate(tmp_path, capsys):
    example = load_example("generate")
    example.main(
        [
            "--steps",
            "2",
            "--max-length",
            "128",
            "--prompt-tokens",
            "300",
            "--max-new-tokens",
            "8",
            "--cpu",
            "--output-dir",
            str(tmp_path),
        ]
    )
    assert "8 tokens" in capsys.readouterr().out
    example.main(
        [
            "--model",
            str(tmp_path),
            "--steps",
            "0",
            "--prompt",
            "And it came to pass",
            "--cpu",
            "--max-new-tokens",
            "5",
            "--temperature",
            "0.7",
            "--static-cache",
        ]
    )
    assert "5 tokens" in capsys.readouterr().out


def test_summarize_encoder_decoder(tmp_path, capsys):
    rows = [
        {"document": f"And it was told. Saul reigned {word} years. " * 20, "summary": word} for word in ("two", "ten")
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    load_example("summarize_encoder_decoder").main(
        [
            "--train-data",
            str(data),
            "--output-dir",
            str(tmp_path / "model"),
            "--steps",
            "2",
            "--batch-size",
            "2",
            "--max-summary-length",
            "6",
            "--cpu",
        ]
    )
    assert "of 2 held-out summaries" in capsys.readouterr().out
    assert (tmp_path / "model" / "model.safetensors").exists()
