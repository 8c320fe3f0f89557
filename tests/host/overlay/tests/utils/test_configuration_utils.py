"""Stand-in for the table that `ConfigTester` reads: fields of every config, with values other than their defaults."""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
    "dtype": "float16",
}
