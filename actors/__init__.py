"""Everything that knows Ray: editor, evaluator, pool, feed."""
