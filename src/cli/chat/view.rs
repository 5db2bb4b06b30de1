//! Draws the screen.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Position, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize as _};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, BorderType, Clear, List, ListItem, Paragraph};

use super::app::App;
use super::plain::failure;
use super::text::{clock, day, harmless, width, wrap};
use crate::client::{Connection, ConversationId, Membership, Message, Status, Trust};

/// The conversation list takes this much, where there is room for it.
const LIST: u16 = 28;
/// Below this the list is left out.
const WIDE: u16 = 72;
/// Lines of input that are shown at most.
const INPUT: usize = 5;

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, app: &mut App) {
    let [body, status] = Layout::vertical([Constraint::Min(3), Constraint::Length(1)]).areas(frame.area());
    let list = if body.width >= WIDE { LIST } else { 0 };
    let [left, right] = Layout::horizontal([Constraint::Length(list), Constraint::Min(10)]).areas(body);
    if list > 0 {
        draw_list(frame, app, left);
    }
    let input = wrap(&app.input, usize::from(right.width.saturating_sub(4))).len().clamp(1, INPUT);
    let [history, below] = Layout::vertical([Constraint::Min(3), Constraint::Length(input as u16 + 2)]).areas(right);
    draw_history(frame, app, history);
    draw_input(frame, app, below);
    draw_status(frame, app, status);
    draw_popup(frame, app);
}

fn draw_list(frame: &mut Frame<'_>, app: &App, area: Rect) {
    let columns = usize::from(area.width.saturating_sub(4));
    let item = |of: ConversationId| {
        let (count, last, muted) = match app.group(of) {
            Some(group) => (group.unread, &group.last, group.muted),
            None => {
                let found = app.conversations.iter().find(|conversation| of == conversation.account);
                found.map_or((0, &None, false), |conversation| (conversation.unread, &conversation.last, false))
            }
        };
        let name = harmless(&app.name(of));
        let unread = if count > 0 { format!(" {count} ") } else { String::new() };
        let name = cut(&name, columns.saturating_sub(width(&unread)));
        let gap = " ".repeat(columns.saturating_sub(width(&name) + width(&unread)));
        let style = if Some(of) == app.open { Style::new().reversed() } else { Style::new() };
        let mark = if muted { Color::DarkGray } else { Color::Green };
        let first = Line::from(vec![
            Span::styled(name, if count > 0 { style.bold() } else { style }),
            Span::styled(gap, style),
            Span::styled(unread, Style::new().fg(Color::Black).bg(mark)),
        ]);
        let under = if app.is_typing(of) {
            Span::from("typing…").fg(Color::Green).italic()
        } else {
            Span::from(cut(&preview(app, of, last.as_ref()), columns)).dim()
        };
        ListItem::new(vec![first, Line::from(under)])
    };
    let items: Vec<ListItem<'_>> = app.list().into_iter().map(item).collect();
    let block = Block::bordered().border_type(BorderType::Rounded).border_style(Style::new().dim()).title(" Sealpost ".bold());
    if items.is_empty() {
        let hint = Paragraph::new(vec![Line::from(""), Line::from(" /to bob@vignette"), Line::from(" begins a conversation").dim()]);
        frame.render_widget(hint.block(block), area);
    } else {
        frame.render_widget(List::new(items).block(block), area);
    }
}

fn preview(app: &App, of: ConversationId, last: Option<&Message>) -> String {
    let Some(last) = last else { return String::new() };
    let body = last.body.as_deref().map_or_else(|| "deleted".to_owned(), harmless).replace('\n', " ");
    match (last.outgoing, of) {
        (true, _) => format!("you: {body}"),
        (false, ConversationId::Group(_)) => format!("{}: {body}", app.name(last.author).split('@').next().unwrap_or_default()),
        (false, ConversationId::Account(_)) => body,
    }
}

fn draw_history(frame: &mut Frame<'_>, app: &mut App, area: Rect) {
    let title = title(app);
    let block = Block::bordered().border_type(BorderType::Rounded).border_style(Style::new().dim()).title(title);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let lines = lines(app, usize::from(inner.width));
    app.page = usize::from(inner.height);
    app.scroll_max = lines.len().saturating_sub(app.page);
    app.scroll = app.scroll.min(app.scroll_max);
    let from = app.scroll_max - app.scroll;
    let shown: Vec<Line<'_>> = lines.into_iter().skip(from).take(app.page).collect();
    // The newest at the bottom, also while there are few.
    let pad = app.page.saturating_sub(shown.len()) as u16;
    let area = Rect { y: inner.y + pad, height: inner.height - pad, ..inner };
    frame.render_widget(Paragraph::new(shown), area);
    if app.scroll > 0 {
        let more = format!(" {} below, Esc ", app.scroll);
        let at = Rect {
            x: inner.right().saturating_sub(more.len() as u16),
            y: inner.bottom().saturating_sub(1),
            width: more.len() as u16,
            height: 1,
        };
        frame.render_widget(Span::from(more).black().on_yellow(), at.intersection(inner));
    }
}

fn title(app: &App) -> Line<'static> {
    let Some(open) = app.open else { return Line::from(" nobody yet ").dim() };
    let mut spans = vec![Span::from(format!(" {} ", harmless(&app.name(open)))).bold()];
    if let Some(conversation) = app.conversation() {
        spans.push(match conversation.trust {
            Trust::Verified => Span::from("verified ").fg(Color::Green),
            Trust::Changed => Span::from("keys changed: /safety ").fg(Color::Red).bold(),
            Trust::Unverified => Span::from("not verified ").dim(),
        });
        if conversation.expire_s > 0 {
            spans.push(Span::from(format!("disappearing after {} s ", conversation.expire_s)).fg(Color::Yellow));
        }
        if conversation.deleted {
            spans.push(Span::from("account deleted ").fg(Color::Red));
        }
    }
    if let Some(group) = app.group(open) {
        spans.push(match group.membership {
            Membership::Member => Span::from(format!("{} members, epoch {} ", group.accounts, group.epoch)).dim(),
            Membership::Creating => Span::from("being created ").fg(Color::Yellow),
            Membership::Rejoining => Span::from("joining again ").fg(Color::Yellow),
            Membership::Left => Span::from("you are not in it ").fg(Color::Red),
            Membership::Closed => Span::from("closed ").fg(Color::Red),
        });
        if group.expire_s > 0 {
            spans.push(Span::from(format!("disappearing after {} s ", group.expire_s)).fg(Color::Yellow));
        }
    }
    if app.is_typing(open) {
        spans.push(Span::from("is typing… ").fg(Color::Green).italic());
    }
    Line::from(spans)
}

fn lines(app: &App, columns: usize) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    let mut last_day = String::new();
    let mut notices = app.notices.iter().filter(|(account, ..)| account.is_none() || *account == app.open).peekable();
    for message in &app.messages {
        while let Some((_, _, text)) = notices.next_if(|(_, after, _)| *after < message.position) {
            lines.extend(notice(text, columns));
        }
        let today = day(message.sent_ms);
        if today != last_day {
            lines.push(Line::from(format!("── {today} ──")).dim().centered());
            last_day = today;
        }
        lines.extend(message_lines(app, message, columns));
    }
    for (_, _, text) in notices {
        lines.extend(notice(text, columns));
    }
    lines
}

fn notice(text: &str, columns: usize) -> Vec<Line<'static>> {
    let color = if text.starts_with('!') { Color::Yellow } else { Color::DarkGray };
    let text = text.trim_start_matches(['!', '#', ' ']);
    wrap(text, columns.saturating_sub(2)).into_iter().map(|line| Line::from(format!("  {line}")).fg(color).italic()).collect()
}

fn message_lines(app: &App, message: &Message, columns: usize) -> Vec<Line<'static>> {
    let color = if message.outgoing { Color::Cyan } else { Color::Magenta };
    let who = if message.outgoing { "you".to_owned() } else { app.name(message.author).split('@').next().unwrap_or_default().to_owned() };
    let head = format!("{} {who} ", clock(message.sent_ms));
    let indent = width(&head).min(columns / 3);
    let body = message.body.as_deref().map(harmless);
    let text = body.clone().unwrap_or_else(|| "this message was deleted".into());
    let style = if body.is_some() { Style::new() } else { Style::new().dim().italic() };
    let mut lines: Vec<Line<'static>> = Vec::new();
    for (number, line) in wrap(&text, columns.saturating_sub(indent + 4)).into_iter().enumerate() {
        let before = if number == 0 {
            vec![Span::from(clock(message.sent_ms)).dim(), Span::from(format!(" {who} ")).fg(color).bold()]
        } else {
            vec![Span::from(" ".repeat(indent))]
        };
        lines.push(Line::from([before, vec![Span::styled(line, style)]].concat()));
    }
    let mut after = Vec::new();
    if message.edited && body.is_some() {
        after.push(Span::from(" edited").dim().italic());
    }
    if message.outgoing {
        after.push(tick(message.status));
    }
    if let Some(last) = lines.last_mut() {
        last.spans.extend(after);
    }
    if !message.reactions.is_empty() {
        let reactions: Vec<String> = message.reactions.iter().map(|(_, emoji)| harmless(emoji)).collect();
        lines.push(Line::from(format!("{}{}", " ".repeat(indent), reactions.join(" "))).fg(Color::Yellow));
    }
    if let Some(reason) = message.failure {
        lines.push(Line::from(format!("{}not delivered: {}", " ".repeat(indent), failure(reason))).fg(Color::Red));
    }
    lines
}

fn tick(status: Status) -> Span<'static> {
    match status {
        Status::Pending => Span::from(" ·").dim(),
        Status::Sent => Span::from(" ✓").dim(),
        Status::Delivered => Span::from(" ✓✓").dim(),
        Status::Read => Span::from(" ✓✓").fg(Color::LightBlue).bold(),
        Status::Failed => Span::from(" ✗").fg(Color::Red).bold(),
    }
}

fn draw_input(frame: &mut Frame<'_>, app: &App, area: Rect) {
    let block = Block::bordered().border_type(BorderType::Rounded);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let columns = usize::from(inner.width.saturating_sub(2)).max(2);
    if app.input.is_empty() {
        let hint = if app.open.is_some() { "a message, or /help" } else { "/to bob@vignette, or /help" };
        frame.render_widget(Span::from(format!("  {hint}")).dim(), inner);
    }
    let (row, column) = cursor(&app.input, app.cursor, columns);
    let rows = rows(&app.input, columns);
    let from = (row + 1).saturating_sub(usize::from(inner.height).max(1));
    let shown: Vec<Line<'_>> = rows.into_iter().skip(from).map(|row| Line::from(format!("  {}", harmless(&row)))).collect();
    if !app.input.is_empty() {
        frame.render_widget(Paragraph::new(shown), inner);
    }
    if app.popup.is_none() && !inner.is_empty() {
        frame.set_cursor_position(Position::new(inner.x + 2 + column as u16, inner.y + (row - from) as u16));
    }
}

/// The input's rows: broken at the edge only, so that the cursor is where the text is.
fn rows(input: &str, columns: usize) -> Vec<String> {
    let mut rows = vec![String::new()];
    let mut used = 0;
    for c in input.chars() {
        let wide = width(c.encode_utf8(&mut [0; 4]));
        if c == '\n' || used + wide > columns {
            rows.push(String::new());
            used = 0;
        }
        if let Some(row) = rows.last_mut().filter(|_| c != '\n') {
            row.push(c);
            used += wide;
        }
    }
    rows
}

fn cursor(input: &str, at: usize, columns: usize) -> (usize, usize) {
    let before = rows(&input[..at], columns);
    let column = before.last().map_or(0, |row| width(row));
    (before.len() - 1, column.min(columns))
}

fn draw_status(frame: &mut Frame<'_>, app: &App, area: Rect) {
    let connection = match app.connection {
        Connection::Live => Span::from(" ● connected ").fg(Color::Green),
        Connection::CatchingUp => Span::from(" ● catching up ").fg(Color::Yellow),
        Connection::Connecting => Span::from(" ○ connecting ").fg(Color::Yellow),
        Connection::Waiting => Span::from(" ○ offline, trying again ").fg(Color::Yellow),
        Connection::Stopped => Span::from(" ○ stopped ").dim(),
        Connection::SignedOut => Span::from(" ✗ signed out: --fresh registers this device anew ").fg(Color::Red),
    };
    let mut spans = vec![connection, Span::from(format!("{} ", app.me)).bold()];
    match app.current_note() {
        Some(note) => spans.push(Span::from(format!(" {}", harmless(note))).fg(Color::Yellow)),
        None => spans.push(Span::from(" /help  Tab: next conversation  PgUp: history  Ctrl-C: leave").dim()),
    }
    frame.render_widget(Line::from(spans), area);
}

fn draw_popup(frame: &mut Frame<'_>, app: &App) {
    let Some(popup) = &app.popup else { return };
    let all = frame.area();
    let widest = popup.lines.iter().map(|line| width(line)).max().unwrap_or_default().max(width(&popup.title)) as u16;
    let (w, h) = ((widest + 6).min(all.width), (popup.lines.len() as u16 + 4).min(all.height));
    let area = Rect { x: (all.width - w) / 2, y: (all.height - h) / 2, width: w, height: h };
    let block = Block::bordered()
        .border_type(BorderType::Rounded)
        .border_style(Style::new().fg(Color::Cyan))
        .title(Span::styled(format!(" {} ", popup.title), Style::new().add_modifier(Modifier::BOLD)))
        .title_bottom(Line::from(" any key closes ").dim().right_aligned());
    let lines: Vec<Line<'_>> =
        std::iter::once(Line::from("")).chain(popup.lines.iter().map(|line| Line::from(format!("  {}", harmless(line))))).collect();
    frame.render_widget(Clear, area);
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

/// The beginning of a text that fits.
fn cut(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let mut short = String::new();
    for c in text.chars() {
        if width(&short) + width(c.encode_utf8(&mut [0; 4])) + 1 > columns {
            break;
        }
        short.push(c);
    }
    short + "…"
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::cli::chat::app::Popup;
    use crate::client::core::content::MessageId;
    use crate::client::{Conversation, GroupSummary};
    use crate::ids::AccountId;
    use crate::ids::GroupId;

    fn message(position: u64, own: AccountId, outgoing: bool, body: &str, status: Status) -> Message {
        let peer = AccountId::from_bytes([2; 16]);
        Message {
            position,
            conversation: peer.into(),
            author: if outgoing { own } else { peer },
            message_id: MessageId([position as u8; 16]),
            outgoing,
            sent_ms: 1_795_392_000_000 + position * 60_000,
            body: Some(body.into()),
            reply_to: None,
            edited: false,
            status,
            failure: None,
            reactions: Vec::new(),
            expires_ms: None,
            group_seq: None,
        }
    }

    fn app() -> App {
        let own = AccountId::from_bytes([1; 16]);
        let peer = AccountId::from_bytes([2; 16]);
        let mut app = App::new("alice@socialink".into(), own);
        app.set_messages(vec![
            message(1, own, true, "hello bob", Status::Read),
            message(2, own, false, "hi \u{1b}[31malice", Status::Delivered),
            message(3, own, true, "how are you", Status::Delivered),
        ]);
        app.open = Some(peer.into());
        app.connection = Connection::Live;
        app.conversations = vec![Conversation {
            account: peer,
            identities: vec!["bob@vignette".parse().expect("valid")],
            trust: Trust::Unverified,
            unread: 2,
            expire_s: 0,
            deleted: false,
            last: app.messages.last().cloned(),
        }];
        app
    }

    fn screen(app: &mut App, columns: u16, rows: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(columns, rows)).expect("a terminal");
        terminal.draw(|frame| draw(frame, app)).expect("drawn");
        terminal.backend().to_string()
    }

    #[test]
    fn the_screen_shows_the_conversation() {
        let text = screen(&mut app(), 100, 20);
        for wanted in ["bob@vignette", "not verified", "2026-11-23", "hello bob ✓✓", "● connected", "you: how are you", " 2 "] {
            assert!(text.contains(wanted), "{wanted} is not on\n{text}");
        }
        assert!(!text.contains('\u{1b}'), "what others write must not reach the terminal");
    }

    #[test]
    fn a_group_looks_like_a_conversation() {
        let mut app = app();
        let group = GroupId::from_bytes([9; 16]);
        app.names.insert(AccountId::from_bytes([2; 16]), "bob@vignette".into());
        app.groups = vec![GroupSummary {
            group,
            name: Some("Berge \u{1b}[31m".into()),
            membership: Membership::Member,
            epoch: 7,
            accounts: 3,
            muted: false,
            expire_s: 0,
            unread: 4,
            last: Some(Message { conversation: group.into(), ..app.messages[1].clone() }),
        }];
        app.open = Some(group.into());
        let text = screen(&mut app, 100, 20);
        for wanted in ["Berge", "3 members, epoch 7", "bob: hi", " 4 "] {
            assert!(text.contains(wanted), "{wanted} is not on\n{text}");
        }
        assert!(!text.contains('\u{1b}'), "what others write must not reach the terminal");
    }

    #[test]
    fn no_size_and_no_input_breaks_it() {
        for (columns, rows) in [(1, 1), (5, 3), (20, 5), (71, 10), (72, 10), (200, 60)] {
            let mut app = app();
            app.input = "日本語 a\nlong input ".repeat(20);
            app.cursor = app.input.len();
            app.notices.push((None, 2, "! keys changed".into()));
            app.popup = Some(Popup { title: "Help".into(), lines: vec!["line".repeat(30); 40] });
            screen(&mut app, columns, rows);
            app.popup = None;
            app.scroll = 1_000;
            screen(&mut app, columns, rows);
        }
    }

    #[test]
    fn warnings_stand_where_they_happened() {
        let mut app = app();
        app.notices.push((app.open, 2, "! bob has a new device".into()));
        let text = screen(&mut app, 100, 20);
        let (notice, after) = (text.find("bob has a new device").expect("shown"), text.find("how are you ✓").expect("shown"));
        assert!(notice < after);
    }

    #[test]
    fn the_cursor_follows_wide_characters_and_breaks() {
        assert_eq!(cursor("日本", "日本".len(), 10), (0, 4));
        assert_eq!(cursor("ab\ncd", 4, 10), (1, 1));
        assert_eq!(cursor("abcdef", 6, 4), (1, 2));
    }
}
