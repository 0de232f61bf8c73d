"""What the tests share: processes, comparison of trees, cases and exercisers."""
