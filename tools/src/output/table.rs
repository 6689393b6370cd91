//! Aligned columns.

use pcibackd::text::printable;

use super::style::{Paint, Style};

/// One field of a table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    /// A text in a style. Control characters in it are escaped: some texts come from guests.
    pub fn new(text: &str, style: Style) -> Self {
        Self {
            text: printable(text),
            style,
        }
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::new(text, Style::Plain)
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::new(&text, Style::Plain)
    }
}

/// Rows of fields, each column as wide as its widest field.
#[derive(Debug, Default)]
pub struct Table {
    indent: usize,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table under these headings.
    pub fn new(headings: &[&str]) -> Self {
        let heading = |text: &&str| Cell::new(text, Style::Heading);
        Self {
            indent: 0,
            rows: vec![headings.iter().map(heading).collect()],
        }
    }

    /// A table that is moved to the right by so many columns.
    pub fn indented(mut self, columns: usize) -> Self {
        self.indent = columns;
        self
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The table as lines of text, without blanks at their ends.
    pub fn render(&self, paint: Paint) -> String {
        const GAP: usize = 2;
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(Cell::width).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut blanks = self.indent;
            for (cell, width) in row.iter().zip(&widths) {
                if !cell.text.is_empty() {
                    text.extend(std::iter::repeat_n(' ', blanks));
                    text.push_str(&paint.paint(cell.style, &cell.text));
                    blanks = 0;
                }
                // What this column leaves blank, and the gap to the next.
                blanks = blanks
                    .saturating_add(width.saturating_sub(cell.width()))
                    .saturating_add(GAP);
            }
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[&[&str]]) -> String {
        let mut table = Table::new(&["A", "LONG", "C"]).indented(1);
        for row in rows {
            table.row(row.iter().map(|text| Cell::from(*text)));
        }
        table.render(Paint::NONE)
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_field_and_lines_end_without_blanks() {
        let text = table(&[&["1", "2", "3"], &["wider", "", ""], &["", "x"], &[]]);
        assert_eq!(
            text,
            " A      LONG  C\n 1      2     3\n wider\n        x\n\n"
        );
    }

    #[test]
    fn letters_are_counted_and_not_bytes() {
        assert_eq!(table(&[&["äöü", "x"]]), " A    LONG  C\n äöü  x\n");
    }

    #[test]
    fn a_guests_name_cannot_move_the_cursor() {
        assert!(table(&[&["a\x1b[2J\nb"]]).contains("a\\u{1b}[2J\\nb"));
    }
}
