//! What the screen shows, and what keys do to it. No I/O.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::plain::short;
use crate::client::{Connection, Conversation, ConversationId, GroupSummary, Message};
use crate::ids::AccountId;

/// Typing is forgotten this long after it was told.
const TYPING: Duration = Duration::from_secs(10);
/// While one types, it is told this often.
const TYPING_TOLD: Duration = Duration::from_secs(5);
/// A note in the status line stays this long.
const NOTE: Duration = Duration::from_secs(8);

/// What a key asks for beyond the screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wish {
    /// Nothing.
    None,
    /// A line was entered.
    Line(String),
    /// Another conversation is open.
    Opened(ConversationId),
    /// Older messages.
    Older,
    /// Tell the other side that one types, or stopped.
    Typing(bool),
    /// Leave.
    Quit,
}

/// A box over the screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Popup {
    pub title: String,
    pub lines: Vec<String>,
}

/// The whole state of the screen.
pub(super) struct App {
    pub me: String,
    pub own: AccountId,
    pub conversations: Vec<Conversation>,
    pub groups: Vec<GroupSummary>,
    /// Names of members that there is no conversation with.
    pub names: HashMap<AccountId, String>,
    pub open: Option<ConversationId>,
    pub messages: Vec<Message>,
    /// Warnings and notes, each behind the message that was the newest then.
    pub notices: Vec<(Option<ConversationId>, u64, String)>,
    pub connection: Connection,
    pub input: String,
    /// Where the cursor is in `input`, in bytes.
    pub cursor: usize,
    /// Lines scrolled up from the newest.
    pub scroll: usize,
    /// How far one can scroll, as drawn last.
    pub scroll_max: usize,
    /// Lines of history on the screen, as drawn last.
    pub page: usize,
    pub popup: Option<Popup>,
    note: Option<(String, Instant)>,
    typing: HashMap<ConversationId, Instant>,
    told_typing: Option<Instant>,
}

impl App {
    pub(super) fn new(me: String, own: AccountId) -> Self {
        Self {
            me,
            own,
            conversations: Vec::new(),
            groups: Vec::new(),
            names: HashMap::new(),
            open: None,
            messages: Vec::new(),
            notices: Vec::new(),
            connection: Connection::Connecting,
            input: String::new(),
            cursor: 0,
            scroll: 0,
            scroll_max: 0,
            page: 10,
            popup: None,
            note: None,
            typing: HashMap::new(),
            told_typing: None,
        }
    }

    /// An account's or a group's name for the screen.
    pub(super) fn name(&self, of: impl Into<ConversationId>) -> String {
        let account = match of.into() {
            ConversationId::Account(account) => account,
            ConversationId::Group(group) => {
                let name = self.groups.iter().find(|one| one.group == group).and_then(|group| group.name.as_deref());
                return super::command::group_name(name, group);
            }
        };
        if account == self.own {
            return "note to yourself".into();
        }
        let conversation = self.conversations.iter().find(|conversation| conversation.account == account);
        let identity = conversation.and_then(|conversation| conversation.identities.first());
        let known = identity.map(ToString::to_string).or_else(|| self.names.get(&account).cloned());
        known.unwrap_or_else(|| short(account))
    }

    /// All that can be opened, the newest first.
    pub(super) fn list(&self) -> Vec<ConversationId> {
        let position = |last: &Option<Message>| last.as_ref().map(|message| message.position);
        let accounts = self.conversations.iter().map(|one| (position(&one.last), ConversationId::Account(one.account)));
        let groups = self.groups.iter().map(|one| (position(&one.last), ConversationId::Group(one.group)));
        let mut all: Vec<(Option<u64>, ConversationId)> = accounts.chain(groups).collect();
        all.sort_by_key(|(position, _)| std::cmp::Reverse(*position));
        all.into_iter().map(|(_, conversation)| conversation).collect()
    }

    pub(super) fn group(&self, of: ConversationId) -> Option<&GroupSummary> {
        self.groups.iter().find(|group| of.group() == Some(group.group))
    }

    pub(super) fn conversation(&self) -> Option<&Conversation> {
        self.conversations.iter().find(|conversation| Some(conversation.account) == self.open.and_then(ConversationId::account))
    }

    /// Shows a note for a while.
    pub(super) fn note(&mut self, text: impl Into<String>) {
        self.note = Some((text.into(), Instant::now()));
    }

    pub(super) fn current_note(&self) -> Option<&str> {
        self.note.as_ref().filter(|(_, since)| since.elapsed() < NOTE).map(|(text, _)| text.as_str())
    }

    pub(super) fn typing_changed(&mut self, who: impl Into<ConversationId>, started: bool) {
        let who = who.into();
        if started {
            self.typing.insert(who, Instant::now());
        } else {
            self.typing.remove(&who);
        }
    }

    pub(super) fn is_typing(&self, who: ConversationId) -> bool {
        self.typing.get(&who).is_some_and(|since| since.elapsed() < TYPING)
    }

    /// Opens a conversation; its messages come later.
    pub(super) fn show(&mut self, conversation: ConversationId) {
        if self.open != Some(conversation) {
            self.open = Some(conversation);
            self.messages.clear();
            self.scroll = 0;
        }
    }

    /// The messages of the open conversation.
    pub(super) fn set_messages(&mut self, messages: Vec<Message>) {
        self.messages = messages;
    }

    pub(super) fn key(&mut self, key: KeyEvent) -> Wish {
        if key.kind == KeyEventKind::Release {
            return Wish::None;
        }
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        let alt = key.modifiers.contains(KeyModifiers::ALT);
        match key.code {
            KeyCode::Char('c' | 'd') if control => return Wish::Quit,
            _ if self.popup.is_some() => {
                self.popup = None;
                return Wish::None;
            }
            KeyCode::Tab => return self.step(1),
            KeyCode::BackTab => return self.step(-1),
            KeyCode::Char('n') if control => return self.step(1),
            KeyCode::Char('p') if control => return self.step(-1),
            KeyCode::Up if alt => return self.step(-1),
            KeyCode::Down if alt => return self.step(1),
            KeyCode::PageUp => return self.scroll_by(self.page.saturating_sub(1).max(1) as isize),
            KeyCode::PageDown => return self.scroll_by(-(self.page.saturating_sub(1).max(1) as isize)),
            KeyCode::Up => return self.scroll_by(1),
            KeyCode::Down => return self.scroll_by(-1),
            KeyCode::Enter if !alt => return self.enter(),
            KeyCode::Esc if !self.input.is_empty() => self.clear(),
            KeyCode::Esc => self.scroll = 0,
            _ => return self.edit(key, control),
        }
        self.typing_wish()
    }

    /// Pasted text goes into the input as it is; it is not sent by line breaks in it.
    pub(super) fn paste(&mut self, text: &str) -> Wish {
        self.insert(&text.replace("\r\n", "\n").replace('\r', "\n"));
        self.typing_wish()
    }

    fn edit(&mut self, key: KeyEvent, control: bool) -> Wish {
        match key.code {
            KeyCode::Enter => self.insert("\n"),
            KeyCode::Char('u') if control => self.clear(),
            KeyCode::Char('w') if control => {
                let before = self.input[..self.cursor].trim_end();
                let from = before.rfind(char::is_whitespace).map_or(0, |at| at + before[at..].chars().next().map_or(1, char::len_utf8));
                self.input.replace_range(from..self.cursor, "");
                self.cursor = from;
            }
            KeyCode::Char('a') if control => self.cursor = 0,
            KeyCode::Char('e') if control => self.cursor = self.input.len(),
            KeyCode::Char('j') if control => self.insert("\n"),
            KeyCode::Char(c) if !control => self.insert(c.encode_utf8(&mut [0; 4])),
            KeyCode::Backspace => {
                if let Some(c) = self.input[..self.cursor].chars().next_back() {
                    self.cursor -= c.len_utf8();
                    self.input.remove(self.cursor);
                }
            }
            KeyCode::Delete if self.cursor < self.input.len() => {
                self.input.remove(self.cursor);
            }
            KeyCode::Left => self.cursor -= self.input[..self.cursor].chars().next_back().map_or(0, char::len_utf8),
            KeyCode::Right => self.cursor += self.input[self.cursor..].chars().next().map_or(0, char::len_utf8),
            KeyCode::Home => self.cursor = 0,
            KeyCode::End => self.cursor = self.input.len(),
            _ => return Wish::None,
        }
        self.typing_wish()
    }

    fn insert(&mut self, text: &str) {
        self.input.insert_str(self.cursor, text);
        self.cursor += text.len();
    }

    fn clear(&mut self) {
        self.input.clear();
        self.cursor = 0;
    }

    fn enter(&mut self) -> Wish {
        let line = std::mem::take(&mut self.input);
        self.cursor = 0;
        self.told_typing = None;
        if line.trim().is_empty() { Wish::None } else { Wish::Line(line) }
    }

    /// Told at the first key, again while it goes on, and once when the input is empty again. Commands are nobody's business.
    fn typing_wish(&mut self) -> Wish {
        let types = !self.input.is_empty() && !self.input.starts_with('/');
        match (types, self.told_typing) {
            (true, told) if told.is_none_or(|told| told.elapsed() > TYPING_TOLD) => {
                self.told_typing = Some(Instant::now());
                Wish::Typing(true)
            }
            (false, Some(_)) => {
                self.told_typing = None;
                Wish::Typing(false)
            }
            _ => Wish::None,
        }
    }

    fn step(&mut self, by: isize) -> Wish {
        let list = self.list();
        let count = list.len() as isize;
        if count == 0 {
            return Wish::None;
        }
        let at = list.iter().position(|conversation| Some(*conversation) == self.open);
        let next = at.map_or(0, |at| (at as isize + by).rem_euclid(count)) as usize;
        self.show(list[next]);
        Wish::Opened(list[next])
    }

    fn scroll_by(&mut self, lines: isize) -> Wish {
        let before = self.scroll;
        self.scroll = self.scroll.saturating_add_signed(lines).min(self.scroll_max);
        // At the top already: there may be more behind it.
        if lines > 0 && self.scroll == self.scroll_max && (before == self.scroll || self.scroll_max > 0) { Wish::Older } else { Wish::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app() -> App {
        App::new("alice@socialink".into(), AccountId::from_bytes([1; 16]))
    }

    fn press(app: &mut App, code: KeyCode, modifiers: KeyModifiers) -> Wish {
        app.key(KeyEvent::new(code, modifiers))
    }

    fn write(app: &mut App, text: &str) {
        for c in text.chars() {
            press(app, KeyCode::Char(c), KeyModifiers::NONE);
        }
    }

    #[test]
    fn editing_keeps_characters_whole() {
        let mut app = app();
        write(&mut app, "grüße 日本");
        press(&mut app, KeyCode::Backspace, KeyModifiers::NONE);
        press(&mut app, KeyCode::Left, KeyModifiers::NONE);
        write(&mut app, "x");
        assert_eq!(app.input, "grüße x日");
        press(&mut app, KeyCode::Delete, KeyModifiers::NONE);
        press(&mut app, KeyCode::Char('w'), KeyModifiers::CONTROL);
        assert_eq!(app.input, "grüße ");
        press(&mut app, KeyCode::Home, KeyModifiers::NONE);
        press(&mut app, KeyCode::Backspace, KeyModifiers::NONE);
        press(&mut app, KeyCode::Enter, KeyModifiers::ALT);
        assert_eq!(app.input, "\ngrüße ");
        assert_eq!(press(&mut app, KeyCode::Enter, KeyModifiers::NONE), Wish::Line("\ngrüße ".into()));
        assert_eq!((app.input.as_str(), app.cursor), ("", 0));
    }

    #[test]
    fn typing_is_told_once_and_taken_back() {
        let mut app = app();
        assert_eq!(press(&mut app, KeyCode::Char('h'), KeyModifiers::NONE), Wish::Typing(true));
        assert_eq!(press(&mut app, KeyCode::Char('i'), KeyModifiers::NONE), Wish::None);
        press(&mut app, KeyCode::Backspace, KeyModifiers::NONE);
        assert_eq!(press(&mut app, KeyCode::Backspace, KeyModifiers::NONE), Wish::Typing(false));
        assert_eq!(press(&mut app, KeyCode::Char('/'), KeyModifiers::NONE), Wish::None, "a command");
    }

    #[test]
    fn any_key_closes_a_box_and_control_c_leaves() {
        let mut app = app();
        app.popup = Some(Popup { title: "t".into(), lines: vec![] });
        assert_eq!(press(&mut app, KeyCode::Char('x'), KeyModifiers::NONE), Wish::None);
        assert!(app.popup.is_none() && app.input.is_empty());
        assert_eq!(press(&mut app, KeyCode::Char('c'), KeyModifiers::CONTROL), Wish::Quit);
    }

    #[test]
    fn scrolling_stays_inside_and_asks_for_more_at_the_top() {
        let mut app = app();
        app.scroll_max = 5;
        assert_eq!(press(&mut app, KeyCode::Up, KeyModifiers::NONE), Wish::None);
        assert_eq!(press(&mut app, KeyCode::PageUp, KeyModifiers::NONE), Wish::Older);
        assert_eq!(app.scroll, 5);
        press(&mut app, KeyCode::PageDown, KeyModifiers::NONE);
        assert_eq!(app.scroll, 0);
    }
}
