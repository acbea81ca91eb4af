"""What a recipe says: text -> Recipe, and the table of what each method asks for. Knows no model."""
