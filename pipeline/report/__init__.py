"""Tables, figures, HTML reports and model cards."""
